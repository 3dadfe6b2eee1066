"""Counted operations against counts by hand: of plain and fused LoRA, attention, full fine-tuning."""

from typing import Any

import numpy as np
import pytest
import torch
from tiny import HIDDEN, INNER, LAYERS, assemble, class_rows, config, write_rows

from peft_engine.meters.flops import count_flops, gemm_rate
from peft_engine.training.step import gradients

RANK, CLASSES = 3, 2


def step_flops(folder, model, method: dict[str, Any], kernels: str, **of_model: Any) -> tuple[int, int, int]:
    """Counted operations of one step on 8 rows; the rows and their padded length."""
    write_rows(folder / "rows.jsonl", class_rows(40))
    settings = config(
        "text-classification", model, folder / "rows.jsonl", folder / "out", adapter=method,
        model={"pooling": "mean", **of_model},
    )  # fmt: skip
    parts = assemble(settings.model_copy(update={"kernels": kernels}))
    parts.group.train()
    parts.group.activate(parts.group.members[0])
    rows = np.arange(8)
    tensors = list(parts.group.members[0].tensors.values())
    data = parts.data["train"]
    counted = count_flops(lambda: gradients(parts.group, parts.task, data, [rows], 8, tensors, parts.runtime, seed=0))
    return counted, len(rows), int(data.lengths[rows].max())


def linears(tokens: int) -> list[tuple[int, int, int]]:
    """(M, K, N) of the linear layers of the tiny BERT: q, k, v, output, up, down."""
    layer = [(tokens, HIDDEN, HIDDEN)] * 4 + [(tokens, HIDDEN, INNER), (tokens, INNER, HIDDEN)]
    return layer * LAYERS


def attention(rows: int, length: int) -> int:
    """Forward: QKᵀ and PV. Backward: five products, of which one computes the scores again."""
    return LAYERS * (2 + 5) * 2 * rows * length * length * HIDDEN


@pytest.mark.parametrize(
    ("kernels", "compute"), [("off", "full"), ("torch", "full"), ("torch", "int8"), ("torch", "bf16")]
)
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_lora_by_hand(tmp_path, tiny_model, kernels, compute, dropout, monkeypatch):
    """A frozen linear: x·Wᵀ and dy·W, the latter not where x needs no gradient (q, k, v of the first layer, from frozen
    embeddings, but for the way to their adapters). Its adapter: two products forward, four backward, three there."""
    monkeypatch.setattr("peft_kernels._compiled._load", lambda: (None, "not in this test"))
    method = {"method": "lora", "rank": RANK, "dropout": dropout}
    counted, rows, length = step_flops(tmp_path, tiny_model("bert"), method, kernels, frozen_compute=compute)
    tokens = rows * length
    expected = 0
    for place, (m, k, n) in enumerate(linears(tokens)):
        first = place < 3  # reads the frozen embeddings: no gradient of x
        expected += 2 * m * k * n * (1 if first else 2)
        if compute == "int8" and not first:
            expected += 2 * m * k * (n // 64)  # columns of dy that are not rounded
        expected += 2 * m * RANK * (k + n)  # forward
        expected += 2 * m * RANK * (n + n + k + (0 if first else k))  # dB, dS, dA, dx
    expected += 3 * 2 * rows * HIDDEN * CLASSES  # the head
    expected += attention(rows, length)
    assert counted == expected


def test_full_by_hand(tmp_path, tiny_model):
    counted, rows, length = step_flops(tmp_path, tiny_model("bert"), {"method": "full"}, "off")
    expected = sum(3 * 2 * m * k * n for m, k, n in linears(rows * length))
    expected += 3 * 2 * rows * HIDDEN * CLASSES
    expected += attention(rows, length)
    assert counted == expected


def test_products_in_place_and_on_several_matrices():
    a, b, c = torch.randn(3, 5), torch.randn(5, 7), torch.randn(3, 7)
    assert count_flops(lambda: c.addmm_(a, b)) == 2 * 3 * 5 * 7
    assert count_flops(lambda: torch.mm(a, b, out=c)) == 2 * 3 * 5 * 7
    many = torch.randn(2, 3, 7)
    assert count_flops(lambda: many.baddbmm_(a.expand(2, 3, 5), b.expand(2, 5, 7))) == 2 * 2 * 3 * 5 * 7


def test_fused_products_on_cuda_by_their_shapes():
    """The formulas of the Triton operators, on fake tensors: nothing is launched."""
    from torch._subclasses import FakeTensorMode

    import peft_kernels._frozen_ops
    import peft_kernels._lora_ops  # noqa: F401

    ours, (m, k, n) = torch.ops.peft_kernels, (11, 5, 7)
    with FakeTensorMode():
        x, a, b = torch.empty(m, k), torch.empty(RANK, k), torch.empty(n, RANK)
        dy, low = torch.empty(m, n), torch.empty(m, RANK)
        seeds = torch.empty(1, dtype=torch.int64)
        assert count_flops(lambda: ours.lora_down(x, a, 0.1, seeds, 0)) == 2 * m * k * RANK
        assert count_flops(lambda: ours.lora_ds_db(dy, b, low, 1.0)) == 2 * 2 * m * n * RANK
        assert count_flops(lambda: ours.lora_da(low, x, 0.1, seeds, 0)) == 2 * m * k * RANK
        assert count_flops(lambda: ours.lora_add_dx(x, low, a, 0.1, seeds, 0)) == 2 * m * k * RANK


@pytest.mark.parametrize("rank", [0, RANK])
def test_frozen_products_by_their_shapes(rank):
    from torch._subclasses import FakeTensorMode

    import peft_kernels._frozen_ops  # noqa: F401

    ours, (m, k, n) = torch.ops.peft_kernels, (11, 5, 7)
    with FakeTensorMode():
        x, dy, w = (torch.empty(*shape, dtype=torch.int8) for shape in ((m, k), (m, n), (n, k)))
        of_rows, of_outputs = torch.empty(m), torch.empty(n)
        low, a, b = (torch.empty(*shape) if rank else None for shape in ((m, rank), (rank, k), (n, rank)))
        kind = torch.float32
        assert count_flops(lambda: torch._int_mm(x, w.t())) == 2 * m * k * n
        counted = count_flops(lambda: ours.frozen_product(x, of_rows, w, of_outputs, None, low, b, 1.0, kind))
        assert counted == 2 * m * n * (k + rank)
        counted = count_flops(lambda: ours.frozen_product_back(dy, of_rows, w, None, low, a, kind, 0.0, None, 0))
        assert counted == 2 * m * k * (n + rank)


def test_rate_of_matrix_products():
    found = gemm_rate(torch.device("cpu"), torch.float32, seconds=0.1)
    assert 1e8 < found["flops_per_second"] < 1e14
    assert (found["dtype"], found["threads"]) == ("float32", torch.get_num_threads())
