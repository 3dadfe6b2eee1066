"""Exact match of the untouched model with a few examples in its prompt: the baseline of a causal-lm run.

    python benchmarks/few_shot.py configs/causal-lm-lora.yaml --shots 8

Asks the test rows that `evaluation.generate_rows` counts, in two forms, as earlier turns of a conversation and as plain
text, and prints both: the better one is the honest baseline. The examples are the first training rows of a seeded draw.
"""

import argparse
import json
import random

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_engine import load_config
from peft_engine.data.splitting import load_splits
from peft_engine.generation import generate_text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("--shots", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=16)
    arguments = parser.parse_args()
    config = load_config(arguments.config)
    splits = load_splits(config)
    assert splits.test is not None, "the config makes no test split"
    shots = random.Random(arguments.seed).sample(splits.train.examples, arguments.shots)
    rows = splits.test.examples[: config.evaluation.generate_rows or None]
    tokenizer = AutoTokenizer.from_pretrained(config.model.path)
    model = AutoModelForCausalLM.from_pretrained(config.model.path, dtype=torch.float32).eval()

    def ask(prompts: list[str], templated: bool) -> list[str]:
        texts = []
        for start in range(0, len(prompts), arguments.batch_size):
            part = prompts[start : start + arguments.batch_size]
            texts += generate_text(model, tokenizer, part, config.evaluation.max_new_tokens, templated=templated)
        return texts

    turns = [message for shot in shots for message in shot["messages"]]
    chat = [
        tokenizer.apply_chat_template(turns + row["messages"][:-1], tokenize=False, add_generation_prompt=True)
        for row in rows
    ]
    shown = "".join(f"{shot['messages'][-2]['content']} {shot['messages'][-1]['content']}\n" for shot in shots)
    plain = [f"{shown}{row['messages'][-2]['content']}" for row in rows]
    answers = [row["messages"][-1]["content"].strip() for row in rows]
    found = {
        "chat": [text.strip() for text in ask(chat, templated=True)],
        "plain": [text.strip().split("\n")[0].strip() for text in ask(plain, templated=False)],
    }
    scores = {
        form: sum(t == a for t, a in zip(texts, answers, strict=True)) / len(rows) for form, texts in found.items()
    }
    print(json.dumps({"shots": arguments.shots, "seed": arguments.seed, "rows": len(rows), "exact_match": scores}))


if __name__ == "__main__":
    main()
