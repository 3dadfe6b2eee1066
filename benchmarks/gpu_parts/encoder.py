"""Part `encoder`: a classification step of BERT-base's shape, 32×128 tokens, dropout 0.1 everywhere."""

import torch
from transformers import BertConfig, BertForSequenceClassification

from .bench import Bench
from .training import Subject, adapted, fused, plain, same_training


def run(bench: Bench) -> None:
    for samples, length in bench.small(((32, 128), (32, 512)), ((3, 16),)):
        bench.room(0 if bench.smoke else 30)
        classification_cell(bench, samples, length)


def classification_cell(bench: Bench, samples: int, length: int, p: float = 0.1) -> None:
    torch.manual_seed(0)
    tiny = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "vocab_size": 96,
    }
    config = BertConfig(num_labels=2, hidden_dropout_prob=p, attention_probs_dropout_prob=p, **bench.small({}, tiny))
    with torch.device(bench.device):
        model = adapted(BertForSequenceClassification(config), p, task="SEQ_CLS", wide=True)
    ids = torch.randint(0, config.vocab_size, (samples, length), device=bench.device)
    mask = torch.ones_like(ids)
    mask[: samples // 2, length - length // 4 :] = 0
    labels = torch.randint(0, 2, (samples,), device=bench.device)
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    frozen = sum(p.numel() for name, p in model.named_parameters() if not p.requires_grad and "embeddings" not in name)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    attention = 12 * config.num_hidden_layers * config.hidden_size * length
    subject = Subject(bench, model, batch, True, ids.numel() * (4 * frozen + 6 * trained + attention), p > 0)
    short = {name: t[: min(4, samples)] for name, t in batch.items()}
    bench.cell(
        "classification step",
        {"model": "bert-base" if not bench.smoke else "bert-tiny", "tokens": f"{samples}x{length}", "p": p},
        {"peft": plain(subject, subject.step()), "ours": fused(subject, subject.step())},
        check=lambda: same_training(subject, short),
        versus={"ours": ["peft"]},
        facts={"floor_ms": bench.floor_ms(subject.flops, 0), "flops": subject.flops},
        memory=True,
        more=subject.rates,
    )
    bench.note(f"bert {samples}x{length}: {subject.told()}")
