"""The loss from a head in int8: against its own rounding written out in float64, and against the head itself."""

import pytest
import torch
from torch import Tensor

from peft_kernels import _cross_entropy_codes as codes_module
from peft_kernels._cross_entropy_codes import losses_and_gradient
from peft_kernels._frozen_units import Emulated
from peft_kernels.frozen_weight import freeze
from peft_kernels.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_reference


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def made(M: int, H: int, V: int) -> tuple[Tensor, Tensor, Tensor]:
    """hidden, weight, targets with some ignored; logits as wide as those of a trained model."""
    targets = torch.randint(0, V, (M,), generator=torch.Generator().manual_seed(5))
    targets[::4] = -100
    return random(M, H) * 2, random(V, H, seed=1) / H**0.5 * 2, targets


def rounded(v: Tensor) -> Tensor:
    step = v.abs().amax(-1, keepdim=True) / 127
    return (v / torch.where(step == 0, 1, step)).round() * step


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("M", "H", "V", "block"), [(1, 4, 3, 8), (9, 16, 50, 16), (33, 24, 129, 64), (20, 40, 64, 64)])
def test_is_its_own_rounding_in_double(M, H, V, block, weighted, monkeypatch) -> None:
    """Logits from rounded rows; in the gradient the target's entry exact, the others rounded in blocks."""
    monkeypatch.setattr(codes_module, "BLOCK", block)
    hidden, weight, targets = made(M, H, V)
    weights = random(M, seed=3).abs() if weighted else None
    head = freeze(weight, "int8")
    losses, dh = losses_and_gradient(hidden, head, targets, weights, -100, 0.7, 7, True)
    wide, scale = head.dequantised().double(), head.scale.double()
    z = 0.7 * rounded(hidden.double()) @ wide.t()
    live = (targets != -100).double() * (1 if weights is None else weights.double())
    column = targets.clamp_min(0).unsqueeze(1)
    want = (z.logsumexp(1) - z.gather(1, column)[:, 0]) * live
    assert torch.allclose(losses.double(), want, rtol=1e-3, atol=1e-3)
    p = z.softmax(1)
    rest = (p * scale).scatter(1, column, torch.where(targets == -100, p[:, 0] * scale[0], 0).unsqueeze(1))
    laid = torch.nn.functional.pad(rest, (0, -V % block)).view(M, -1, block)
    rest = rounded(laid).view(M, -1)[:, :V] / scale
    rest = rest.scatter_add(1, column, (p.gather(1, column) - 1) * (targets != -100).double().unsqueeze(1))
    want_dh = (rest * (0.7 * live).unsqueeze(1)) @ wide
    off = (dh.double() - want_dh).norm()
    assert off <= 5e-3 * want_dh.norm() + 1e-9
    assert not dh[targets == -100].any()


def test_compiled_and_plain_agree_and_emulated_units_too(monkeypatch) -> None:
    hidden, weight, targets = made(40, 32, 300)
    want = losses_and_gradient(hidden, freeze(weight, "int8"), targets, None, -100, 1.0, 16, True)
    monkeypatch.setattr(codes_module.compiled, "usable", lambda *_: False)
    for units in (None, Emulated("int8")):
        got = losses_and_gradient(hidden, freeze(weight, "int8", units=units), targets, None, -100, 1.0, 16, True)
        assert torch.allclose(got[0], want[0], rtol=1e-5, atol=1e-5)
        assert (got[1] - want[1]).norm() <= 1e-3 * want[1].norm()


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_as_the_loss_of_a_model(reduction) -> None:
    """Near the head in full precision, differentiable, the same bits whatever the chunk, nothing but hidden trained."""
    hidden, weight, targets = made(64, 48, 500)
    hidden.requires_grad_()
    codes = freeze(weight, "int8")
    found = []
    for rows in (None, 16, 5):
        loss = linear_cross_entropy(
            hidden, weight, targets, reduction=reduction, logit_scale=0.5, codes=codes, chunk_rows=rows, backend="torch"
        )
        found.append((loss.detach(), *torch.autograd.grad(loss, hidden)))
    assert all(torch.equal(a, b) for one in found[1:] for a, b in zip(one[1:], found[0][1:], strict=True))
    losses = linear_cross_entropy_reference(hidden.double(), weight.double(), targets, logit_scale=0.5)
    truth = losses.sum() / (1 if reduction == "sum" else int((targets != -100).sum()))
    (want,) = torch.autograd.grad(truth, hidden)
    assert abs(float(found[0][0]) - float(truth.detach())) <= 0.01 * abs(float(truth.detach()))
    cosine = torch.nn.functional.cosine_similarity(found[0][1].flatten().double(), want.flatten().double(), 0)
    assert cosine >= 0.999
    with torch.no_grad():
        quiet = linear_cross_entropy(hidden, weight, targets, reduction=reduction, logit_scale=0.5, codes=codes)
    assert torch.equal(quiet, found[0][0])


def test_rows_that_count_and_rows_that_are_not_finite() -> None:
    hidden, weight, targets = made(12, 16, 40)
    codes, rows = freeze(weight, "int8"), torch.tensor([1, 2, 3, 5])
    some = linear_cross_entropy(hidden, weight, targets, rows=rows, codes=codes)
    assert torch.equal(some, linear_cross_entropy(hidden[rows], weight, targets[rows], codes=codes))
    hidden[2, 0] = torch.nan
    assert linear_cross_entropy(hidden, weight, targets, codes=codes).isnan()
    losses, dh = losses_and_gradient(hidden, codes, targets, None, -100, 1.0, 4, True)
    assert losses[2].isnan()
    assert dh[2].isnan().all()
    others = [i for i in range(12) if i != 2]
    assert losses[others].isfinite().all()
    assert dh[others].isfinite().all()


def test_targets_outside_of_the_vocabulary_raise() -> None:
    hidden, weight, targets = made(6, 16, 40)
    for wrong in (40, -7):
        targets[3] = wrong
        with pytest.raises(IndexError, match="targets must be -100 or from 0 to 39"):
            linear_cross_entropy(hidden, weight, targets, codes=freeze(weight, "int8"))


def test_nothing_to_learn_from() -> None:
    hidden, weight, _ = made(6, 16, 40)
    hidden.requires_grad_()
    targets = torch.full((6,), -100)
    loss = linear_cross_entropy(hidden, weight, targets, codes=freeze(weight, "int8"))
    loss.backward()
    assert float(loss) == 0
    assert not hidden.grad.any()


def test_refusals() -> None:
    hidden, weight, targets = made(6, 16, 40)
    codes = freeze(weight, "int8")
    for settings, told in (
        ({"codes": freeze(weight, "bf16")}, "codes must be int8"),
        ({"codes": freeze(weight[:30], "int8")}, r"codes must be int8 \(40, 16\)"),
        ({"codes": freeze(weight, "int8", columns=torch.tensor([1]))}, "without outlier columns"),
        ({"bias": torch.zeros(40)}, "frozen head without bias"),
        ({"softcap": 5.0}, "softcap"),
        ({"z_loss": 0.1}, "z_loss"),
        ({"reduction": "none"}, "reduction none"),
        ({"weight": weight.clone().requires_grad_()}, "a frozen head"),
    ):
        given = {"weight": weight, "codes": codes, **settings}
        with pytest.raises(ValueError, match=told):
            linear_cross_entropy(hidden, targets=targets, **given)
