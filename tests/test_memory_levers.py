"""benchmarks/memory_levers.py: the fake count is the real one, and its sums are bitsandbytes' own."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import memory_levers as levers

SHAPE: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 4, "num_attention_heads": 4, "head_dim": 16,
    "num_key_value_heads": 2, "vocab_size": 300, "tie_word_embeddings": True,
}  # fmt: skip


@pytest.mark.parametrize("one", levers.CHECKED, ids=levers.Levers.told)
def test_fake_counts_what_is_real(one: levers.Levers) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPE, max_position_embeddings=512, use_cache=False)
    model = levers.prepared(LlamaForCausalLM(config), one, "torch")
    ids = torch.randint(0, 300, (2, 256))
    real = levers.counted(model, one, ids, False)
    fake = levers.count_fake(SHAPE, 2, 256, one, False)
    assert fake["weights"] == real["weights"]
    assert fake["optimizer"] == real["optimizer"]
    assert fake["peak"] == pytest.approx(real["peak"], rel=0.02)


def test_levers_on_a_card() -> None:
    """Each does what it is for, on the path that a card takes. Activations come back four ahead: of so few layers that
    is all, so it takes more."""
    shape = SHAPE | {"num_hidden_layers": 12}
    found = {}
    for one in (*levers.ALONE, levers.SMALL):
        counted = levers.count_fake(shape, 1, 4096, replace(one, weights="", layers=False), True)
        found[one] = levers.added_up(counted, shape, one)
    plain, fused = (found[replace(levers.LORA, fused=on)]["peak"] for on in (False, True))
    assert fused < 0.7 * plain
    half, all_layers = (found[replace(levers.LORA, checkpointing=k)]["peak"] for k in (2, 1))
    assert all_layers < half < fused
    away = found[replace(levers.LORA, activation_offload=True)]
    assert away["peak"] < 0.8 * fused
    assert away["host"] > fused - away["peak"]
    assert found[levers.SMALL]["peak"] < all_layers
    layers = found[replace(levers.LORA, layers=True)]
    each = 2 * sum(levers.linears(shape))
    assert (fused - layers["peak"], layers["host"]) == (10 * each, 12 * each)
    early = found[levers.Levers("full", checkpointing=1, in_backward=True)]
    assert early["peak"] <= found[levers.Levers("full", checkpointing=1)]["peak"]


def test_optimizer_in_backward() -> None:
    """Of few tokens, whose peak is not at the loss. Autocast's copies of the weights, half as large as the gradients,
    are alive in both."""
    shape, full = SHAPE | {"num_hidden_layers": 12}, levers.Levers("full", checkpointing=1)
    at_end, early = (levers.count_fake(shape, 1, 64, replace(full, in_backward=on), True) for on in (False, True))
    assert early["gradients"] == 0
    assert at_end["peak"] - early["peak"] > 0.35 * at_end["gradients"]


@pytest.mark.parametrize(("count", "out"), [(64 * 160, 160), (63 * 129, 129), (1024 * 576, 1024)])
def test_bytes_of_codes_are_those_of_bitsandbytes(count: int, out: int) -> None:
    import bitsandbytes

    weight = torch.randn(out, count // out)
    codes, state = bitsandbytes.functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    beside = [state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
    real = codes.nbytes, sum(t.nbytes for t in beside)
    assert sum(real) == pytest.approx(sum(levers.code_bytes(count, out, "nf4")), rel=1e-3)
    eight = bitsandbytes.nn.Int8Params(weight, requires_grad=False).to("cpu")
    if eight.dtype == torch.int8:
        assert (eight.nbytes, eight.SCB.nbytes) == levers.code_bytes(count, out, "int8")


def test_the_fastest_that_fits() -> None:
    key = "8B 2048 "
    sizes = [40e9, 30e9, 20e9, 12e9, 9e9, 8e9, 7e9, 3e9]
    cells = {key + one.told(): {"peak": size} for one, size in zip(levers.LADDER.values(), sizes, strict=True)}
    assert levers.fits(cells, 48, "8B", 2048) == "no lever"
    assert levers.fits(cells, 40, "8B", 2048) == "every second layer checkpointed"
    assert levers.fits(cells, 24, "8B", 2048) == "all layers checkpointed"
    assert levers.fits(cells, 8, "8B", 2048) == "nf4, checkpointed, activations on the host"
    assert levers.fits(cells, 3, "8B", 2048) == "none of these"


def test_the_document_holds_what_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    text = (levers.ROOT / "docs" / "MEMORY.md").read_text(encoding="utf-8")
    levers.main(["tables"])
    printed = capsys.readouterr().out.strip()
    assert printed.count("\n\n") == 2
    for table in printed.split("\n\n"):
        assert f"\n{table}\n" in text


def test_cells_that_are_there_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    levers.main(["real"])
    assert capsys.readouterr().err.count("real LoRA") == sum(one.method == "lora" for one in levers.ON_CPU)


def test_tables_of_nothing_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        levers.main(["tables", "--out", str(tmp_path / "new.json")])
    assert re.search(r"new\.json lacks \d+ cells, real LoRA, plain peft first", capsys.readouterr().err)
