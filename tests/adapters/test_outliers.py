"""Outlier channels: found where they were planted, shared by siblings, and worth what the levers cost."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM

from peft_engine.adapters.fusing.outliers import Outliers, choose, collect, outlier_columns, smooth_vector
from peft_engine.errors import Diverged

PLANTED = [3, 17, 40]


def planted(rows: int, features: int, seed: int = 0) -> Tensor:
    """Normal rows in which three channels are a hundred times larger."""
    x = torch.randn(rows, features, generator=torch.Generator().manual_seed(seed))
    x[:, PLANTED] *= 100
    return x


def absmax(x: Tensor) -> Tensor:
    return x.abs().amax(0)


def rounded(t: Tensor) -> Tensor:
    """Each row in 255 steps, as float64."""
    step = t.double().abs().amax(-1, keepdim=True) / 127
    return (t.double() / step).round() * step


def error(y: Tensor, wanted: Tensor) -> float:
    """Median over outputs of the relative error: a few outputs must not carry it."""
    return float(((y - wanted).norm(dim=0) / wanted.norm(dim=0)).median())


def product(x: Tensor, weight: Tensor, what: Outliers) -> Tensor:
    """x·Wᵀ of rounded factors (M, N), as the two levers are defined."""
    kept: Tensor | float = 0.0
    if what.smooth is not None:
        x, weight = x / what.smooth, weight * what.smooth
    if what.columns is not None:
        kept = x[:, what.columns].double() @ weight[:, what.columns].double().T
        x, weight = x.clone(), weight.clone()
        x[:, what.columns], weight[:, what.columns] = 0, 0
    return rounded(x) @ rounded(weight).T + kept


def test_each_lever_mends_what_planted_channels_break() -> None:
    x, weight = planted(300, 128), torch.randn(48, 128, generator=torch.Generator().manual_seed(1))
    weight[:, PLANTED] /= 100  # or the planted channels were all that the output is made of
    stats = {"layer": absmax(planted(200, 128, seed=5))}
    wanted = x.double() @ weight.double().T
    broken = error(product(x, weight, choose(stats, {"layer": weight}, "none")["layer"]), wanted)
    ordinary = torch.randn(300, 128, generator=torch.Generator().manual_seed(2))
    normal = torch.randn(48, 128, generator=torch.Generator().manual_seed(3))
    usual = error(product(ordinary, normal, Outliers()), ordinary.double() @ normal.double().T)
    assert broken > 20 * usual
    for lever in ("smooth", "columns", "both"):
        what = choose(stats, {"layer": weight}, lever)["layer"]  # type: ignore[arg-type]
        assert error(product(x, weight, what), wanted) < 1.5 * usual, lever


def test_both_levers_smooth_what_the_columns_leave() -> None:
    x, weight = planted(300, 128), torch.randn(48, 128, generator=torch.Generator().manual_seed(1))
    x[:, 50:60] *= 3  # large, and no outliers
    weight[:, PLANTED] /= 100
    stats, wanted = {"layer": absmax(x)}, x.double() @ weight.double().T
    found = {lever: choose(stats, {"layer": weight}, lever)["layer"] for lever in ("smooth", "columns", "both")}  # type: ignore[arg-type]
    both, rest = found["both"], [k for k in range(128) if k not in PLANTED]
    assert both.columns is not None
    assert both.columns.tolist() == PLANTED
    assert both.smooth is not None
    assert torch.equal(both.smooth[PLANTED], torch.ones(3))
    assert torch.equal(both.smooth[rest], smooth_vector(stats["layer"][rest], [weight[:, rest]]))
    errors = {lever: error(product(x, weight, one), wanted) for lever, one in found.items()}
    assert errors["both"] < 0.9 * errors["columns"], errors


def test_planted_channels_are_the_columns() -> None:
    found = outlier_columns(absmax(planted(400, 130)))
    assert found is not None
    assert found.dtype == torch.int64
    assert found.tolist() == PLANTED
    assert outlier_columns(absmax(torch.randn(400, 130))) is None
    assert outlier_columns(absmax(planted(400, 130)) * 1e-6).tolist() == PLANTED  # type: ignore[union-attr]


def test_the_largest_are_kept_where_there_are_too_many() -> None:
    stats = torch.ones(128)
    stats[40:47] = torch.tensor([50.0, 70.0, 20.0, 90.0, 60.0, 30.0, 10.0])
    found = outlier_columns(stats)
    assert found is not None
    assert found.tolist() == [40, 41, 43, 44]  # four of 128, a 32nd


def test_dead_channels_do_not_move_the_threshold() -> None:
    stats = absmax(planted(400, 130))
    stats[60:] = 0  # more than half
    assert outlier_columns(stats).tolist() == PLANTED  # type: ignore[union-attr]
    assert outlier_columns(torch.zeros(64)) is None


@pytest.mark.parametrize("alpha", [0.25, 0.5, 0.8])
def test_smoothing_is_equation_four(alpha: float) -> None:
    generator = torch.Generator().manual_seed(4)
    x = torch.rand(33, generator=generator) * 8 + 1
    weights = [torch.randn(n, 33, generator=generator) for n in (7, 19, 2)]
    found = smooth_vector(x, weights, alpha)
    assert found.dtype == torch.float32
    for k in range(33):
        largest = max(abs(float(v)) for weight in weights for v in weight[:, k])
        assert float(found[k]) == pytest.approx(float(x[k]) ** alpha / largest ** (1 - alpha), rel=1e-5)


def test_smoothing_of_quiet_and_dead_channels_stays_in_bounds() -> None:
    x = torch.ones(20)
    x[4], x[5], x[6] = 0.0, 1e-12, 1e-3
    weight = torch.full((3, 20), 0.25)
    weight[:, 7] = 0
    found = smooth_vector(x, [weight])
    assert found[4] == found[7] == 1
    assert found[5] == found[6] == pytest.approx(0.1**0.5 / 0.25**0.5)
    assert found[0] == pytest.approx(2.0)
    assert torch.equal(smooth_vector(torch.zeros(20), [weight]), torch.ones(20))


def test_what_is_not_finite_is_refused_by_name() -> None:
    stats = absmax(planted(20, 64))
    stats[11] = float("nan")
    for lever in ("smooth", "columns", "both"):
        with pytest.raises(Diverged, match=r"1 of 64 input channels of model\.up are not finite") as caught:
            choose({"model.up": stats}, {"model.up": torch.randn(5, 64)}, lever)  # type: ignore[arg-type]
        assert caught.value.exit_code == 5


def test_a_layer_without_statistics_gets_no_lever() -> None:
    weights = {"seen": torch.randn(5, 64), "unseen": torch.randn(5, 64)}
    for lever in ("smooth", "columns", "both"):
        found = choose({"seen": absmax(planted(200, 64))}, weights, lever)  # type: ignore[arg-type]
        assert found.keys() == weights.keys()
        assert (found["unseen"].smooth, found["unseen"].columns) == (None, None)
        chosen = found["seen"].smooth is not None, found["seen"].columns is not None
        assert chosen == (lever != "columns", lever != "smooth")


@pytest.mark.parametrize("adapted", [False, True])
def test_siblings_share_what_is_chosen(adapted: bool, tiny_model: Callable[[str], Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model("llama"))
    if adapted:
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj", "up_proj", "down_proj"]))
    linears = {n: m for n, m in model.named_modules() if type(m) is nn.Linear and "lora" not in n and "head" not in n}
    ids = torch.arange(60).reshape(3, 20)
    stats = collect(model, linears, lambda: model(input_ids=ids))
    assert stats.keys() == linears.keys()
    what = choose(stats, {n: m.weight for n, m in linears.items()}, "smooth")
    for layer in ("layers.0", "layers.1"):
        own = {n.split(".")[-2 if n.endswith("base_layer") else -1]: one for n, one in what.items() if layer in n}
        assert own["q_proj"] is own["k_proj"] is own["v_proj"]
        assert own["gate_proj"] is own["up_proj"]
        assert len({id(one) for one in own.values()}) == 4
    assert len({id(one) for one in what.values()}) == 8


class Calls(nn.Module):
    """Linears called in every way that a parent may call them."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("first", "second", "other", "twice", "again", "never"):
            setattr(self, name, nn.Linear(6, 6))
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x) + self.second(x)
        y = self.other(y.clone())
        x = self.drop(x)
        return self.again(self.twice(x)) + self.twice(y) + self.again(y)


def test_statistics_are_those_of_all_calls() -> None:
    torch.manual_seed(0)
    model, x = Calls(), torch.randn(3, 5, 6)
    model.drop.train()
    model.first.eval()
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    stats = collect(model, names, lambda: (model(x), model(-2 * x)))
    assert torch.equal(torch.get_rng_state(), state)  # nothing was dropped
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_pre_hooks for module in model.modules())

    wanted: dict[str, list[Tensor]] = {name: [] for name in names}
    with torch.no_grad():
        for one in (x, -2 * x):
            y = model.first(one) + model.second(one)
            wanted["first"].append(one)
            wanted["other"].append(y)
            z = model.other(y)
            wanted["twice"] += [one, z]
            wanted["again"] += [model.twice(one), z]
    assert stats.keys() == set(names) - {"never"}
    for name in ("first", "other", "twice", "again"):
        assert torch.equal(stats[name], torch.cat(wanted[name]).abs().amax((0, 1))), name
    assert stats["first"] is stats["second"]
    assert len({id(one) for one in stats.values()}) == 4


def test_a_tensor_changed_in_place_is_another_input() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.one(x)
            return y + self.two(x.mul_(3))

    model, x = InPlace(), torch.rand(2, 4) + 1
    first = x.abs().amax(0)
    stats = collect(model, ["one", "two"], lambda: model(x))
    assert torch.equal(stats["one"], first)
    assert torch.equal(stats["two"], first * 3)


def test_a_failing_batch_leaves_the_model_as_it_was(tiny_model: Callable[[str], Path]) -> None:
    model = AutoModel.from_pretrained(tiny_model("bert")).train()
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    with pytest.raises(IndexError):
        collect(model, names, lambda: model(input_ids=torch.full((1, 3), 10**6)))
    assert model.training
    assert not any(module._forward_pre_hooks for module in model.modules())
