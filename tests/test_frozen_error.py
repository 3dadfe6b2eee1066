"""Rounded layers of real models against float64: what `benchmarks/frozen_error.py` measures, and that it measures."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from frozen_error import LEAST, Layers, below, error, measured, prepared, report, settings
from peft_engine.adapters.fusing.outliers import Outliers


def test_an_error_by_hand() -> None:
    found = error(torch.tensor([[3.0, 4.0]]), torch.tensor([[3.0, 0.0]]))
    assert (found.cosine, found.relative) == (pytest.approx(0.6), pytest.approx(4 / 3))
    assert error(torch.ones(3), torch.ones(3)).relative == 0


def test_a_layer_that_is_wrong_shows() -> None:
    """The figures are of what the kernels compute, against products made here."""
    draw = torch.Generator().manual_seed(0)
    weights = [torch.randn(n, 32, generator=draw) for n in (24, 16)]
    x = torch.randn(60, 32, generator=draw)
    dys: list[Tensor | None] = [torch.randn(60, 24, generator=draw), None]
    fine = measured(Layers(["a", "b"], weights, x, dys), "int8", Outliers(), False)
    for one in (*fine["outputs"].values(), fine["dx"]):
        assert 1e-3 < one["relative"] < 0.02
        assert one["cosine"] > LEAST
    assert below({"layers": [fine]}) == []
    outlier = x.clone()
    outlier[:, 5] *= 1000
    broken = measured(
        Layers(["a", "b"], [w.index_fill(1, torch.tensor([5]), 0) for w in weights], outlier, dys),
        "int8",
        Outliers(),
        False,
    )
    assert below({"layers": [broken]})[:2] == ["a", "b"]
    mended = Outliers(columns=torch.tensor([5]))
    kept = measured(
        Layers(["a", "b"], [w.index_fill(1, torch.tensor([5]), 0) for w in weights], outlier, dys),
        "int8",
        mended,
        False,
    )
    assert below({"layers": [kept]}) == []
    wide = [torch.randn(128, 32, generator=draw)]
    peaks = [torch.randn(60, 128, generator=draw).index_fill(1, torch.tensor([9]), 400)]
    errors = [measured(Layers(["a"], wide, x, peaks), "int8", Outliers(), spare)["dx"] for spare in (False, True)]
    assert errors[1]["relative"] < errors[0]["relative"] / 2


@pytest.mark.assets
@pytest.mark.parametrize("model", ["minilm", pytest.param("smollm2", marks=pytest.mark.slow)])
def test_every_layer_of_a_real_model(model: str, assets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(assets.parent)
    group, task, batches = prepared(settings(model, 4, 1, tmp_path))
    linears = 36 if model == "minilm" else 210
    for found in report(group, task, batches, ["int8", "bf16"], ["columns"]):
        assert sum(len(one["outputs"]) for one in found["layers"]) == linears
        assert sum(one["dx"] is not None for one in found["layers"]) >= linears * 4 // 7 - 1
        wrong = below(found)
        if found["format"] == "int8":
            # a row of dy with one large number errs by sqrt(N) / (127 sqrt(12)) of its norm: by .126 in dx of gate and
            # up together, N = 3,072; its cosine is .992 then
            assert max(one["dx"]["relative"] for one in found["layers"] if one["dx"]) < 0.126
            wrong = [name for name in wrong if not name.startswith("dx of ")]
        assert wrong == []
        ends = found["gradients"]["all"]
        assert ends["cosine"] > 0.99
        assert 0 < ends["relative"] < 0.2
