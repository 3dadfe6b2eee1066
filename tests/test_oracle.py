"""Twenty steps of the engine equal twenty steps of a plain torch + peft loop (plain_loop.py)."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from plain_loop import BATCH, CLIP, DECAY, MICRO, SEED, STEPS, WARM, Case, Plain
from safetensors.torch import load_file
from tiny import chat_rows, class_rows, config, pair_rows, write_rows

from peft_engine.run import train

IN_FULL = {"llama": "lm_head", "qwen2": "norm", "gpt2": "wte", "bert": "pooler"}


def cases() -> list[Case]:
    found = []
    for family in ("llama", "gpt2", "bert", "qwen2"):
        task = "text-classification" if family == "bert" else "causal-lm"
        save = [IN_FULL[family]]
        found += [
            Case(family, "lora", task),
            Case(family, "lora", task, options={"rslora": True}, plain={"use_rslora": True}),
            Case(family, "lora", task, options={"dora": True}, plain={"use_dora": True}),
            Case(family, "lora", task, options={"lora_plus_ratio": 4.0}),
            Case(family, "lora", task, options={"modules_to_save": save}, plain={"modules_to_save": save}),
            Case(family, "head", task),
            Case(family, "full", task),
        ]
        if family != "llama":
            found.append(Case(family, "bitfit", task))
    for method in ("lora", "head", "full"):
        found.append(Case("llama", method, "text-classification"))
        found.append(Case("bert", method, "text-classification", pooling="mean"))
    found += [Case("bert", "lora", "text-classification", kind=kind) for kind in ("multi", "regression")]
    return found


@pytest.mark.parametrize("case", cases(), ids=str)
def test_twenty_steps_equal_a_plain_loop(case: Case, tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    model, rows = tiny_model(case.family), data(case)
    rate = {"full": 1e-3}.get(case.method, 1e-2)
    adapter = {"method": case.method, **case.options}
    if case.method == "lora":
        adapter |= {"rank": 4, "alpha": 6, "dropout": 0.0}
    settings = config(
        case.task,
        model,
        write_rows(tmp_path / "rows.jsonl", rows),
        tmp_path / "out",
        model={"pooling": case.pooling} if case.task != "causal-lm" else {},
        adapter=adapter,
        data={"split": {"eval": 0.0, "test": 0.0}},
        training={
            "steps": STEPS,
            "batch_size": BATCH,
            "micro_batch_size": MICRO,
            "learning_rate": rate,
            "schedule": "cosine",
            "warmup": WARM / STEPS,
            "max_grad_norm": CLIP,
            "weight_decay": DECAY,
            "seed": SEED,
            "save_every": STEPS,
        },
    )
    train(settings)
    logged = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]

    plain = Plain(case, model, rows, rate)
    losses, norms = plain.run()

    assert [row["step"] for row in logged] == list(range(1, STEPS + 1))
    # relative as well: near a loss of 6 two neighbouring fp32 numbers are 4.8e-7 apart
    assert [row["loss"] for row in logged] == pytest.approx(losses, abs=1e-6, rel=1e-6)
    assert [row["grad_norm"] for row in logged] == pytest.approx(norms, rel=1e-4)
    assert max(norms) > CLIP, "clipping was never tried"
    assert abs(losses[-1] - losses[0]) > 1e-3, "nothing was learned, so nothing was compared"
    compare(load_file(tmp_path / "out/adapter/adapter_model.safetensors"), plain.trained(), rate)


def compare(engine: dict[str, torch.Tensor], plain: dict[str, torch.Tensor], rate: float) -> None:
    """Adam divides by the gradient's size, so where that is rounding noise (a key's bias shifts all scores of a softmax
    alike) the direction is noise too; everything else moved alike to a hundredth of one step."""
    assert sorted(engine) == sorted(plain)
    for name, tensor in plain.items():
        ours = engine[name]
        if name.endswith(("key.bias", "c_attn.bias")):
            keep = torch.ones_like(tensor, dtype=torch.bool)
            keep[slice(None) if "key" in name else slice(len(tensor) // 3, 2 * len(tensor) // 3)] = False
            ours, tensor = ours[keep], tensor[keep]
        assert ours.dtype == torch.float32
        far = (ours - tensor).abs() > rate / 100 + 1e-4 * tensor.abs()
        assert not far.any(), f"{name}: {int(far.sum())} of {far.numel()} values differ"


def data(case: Case) -> list[dict[str, Any]]:
    if case.task == "causal-lm":
        return {"llama": chat_rows, "gpt2": text_rows, "qwen2": pair_rows}[case.family](20)
    labels: tuple[Any, ...] = ("no", "yes", "maybe")
    if case.kind == "multi":
        labels = (["a"], ["a", "b"], [], ["b", "c"])
    if case.kind == "regression":
        labels = (0.5, -1.25, 2.0)
    return class_rows(20, labels)


def text_rows(count: int) -> list[dict[str, Any]]:
    return [{"text": row["text"]} for row in class_rows(count)]


@pytest.mark.parametrize("family", ["bert", "qwen2"])
def test_the_micro_batch_does_not_change_the_losses(
    family: str, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    """Trap 1: a mean of the micro-batches' means would weigh short rows too much."""
    task = "text-classification" if family == "bert" else "causal-lm"
    rows = write_rows(tmp_path / "rows.jsonl", class_rows(20) if family == "bert" else pair_rows(20))
    curves, finals = {}, {}
    for size in (1, 3, BATCH):
        settings = config(
            task,
            tiny_model(family),
            rows,
            tmp_path / f"micro-{size}",
            adapter={"rank": 4, "dropout": 0.0},
            data={"split": {"eval": 0.0, "test": 0.0}},
            training={"steps": 8, "batch_size": BATCH, "micro_batch_size": size, "learning_rate": 5e-3},
        )
        train(settings)
        curves[size] = losses_in(tmp_path / f"micro-{size}")
        finals[size] = load_file(tmp_path / f"micro-{size}/adapter/adapter_model.safetensors")
    for size in (1, 3):
        assert curves[size] == pytest.approx(curves[BATCH], rel=1e-6)
        compare(finals[size], finals[BATCH], 5e-3)
    assert curves[1] != curves[BATCH], "no rounding differs: the size was not used"


def losses_in(run: Path) -> list[float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


@pytest.mark.parametrize(
    ("optimizer", "rate", "states"),
    [
        ("adamw", 3e-3, {"step", "exp_avg", "exp_avg_sq"}),
        ("sgd", 3e-2, {"momentum_buffer"}),
        ("adafactor", 1e-1, {"step", "row_var", "col_var", "variance"}),
        ("adamw8bit", 3e-3, {"state1", "state2", "qmap1", "qmap2", "absmax1", "absmax2"}),
    ],
)
def test_every_optimizer_learns_and_resumes(
    optimizer: str, rate: float, states: set[str], tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    """Loss falls, the state is the optimizer's own, and a run cut in the middle ends in the same bits."""
    settings = config(
        "causal-lm",
        tiny_model("llama"),
        write_rows(tmp_path / "rows.jsonl", chat_rows(12)),
        tmp_path / "out",
        adapter={"method": "full"},
        data={"split": {"eval": 0.0, "test": 0.0}},
        training={
            "steps": 12,
            "batch_size": 6,
            "optimizer": optimizer,
            "learning_rate": rate,
            "schedule": "constant",
            "warmup": 0.0,
            "save_every": 6,
        },
    )
    train(settings)
    curve = losses_in(tmp_path / "out")
    assert curve[-1] < curve[0] - 0.5
    state = load_file(tmp_path / "out/checkpoints/step-12/default.optimizer.safetensors")
    assert {name.split("::")[-1] for name in state} == states
    weights = load_file(tmp_path / "out/adapter/adapter_model.safetensors")
    if optimizer == "adamw8bit":  # bitsandbytes leaves tensors of less than 4,096 values in fp32
        moments = [t for name, t in state.items() if name.endswith("::state1")]
        assert {t.dtype for t in moments if t.numel() >= 4096} == {torch.uint8}
        assert len(moments) == len(weights)

    shutil.rmtree(tmp_path / "out/checkpoints/step-12")
    shutil.rmtree(tmp_path / "out/adapter")
    train(settings, resume=True)
    assert losses_in(tmp_path / "out") == curve
    again = load_file(tmp_path / "out/adapter/adapter_model.safetensors")
    assert all(torch.equal(again[name], weights[name]) for name in weights)
