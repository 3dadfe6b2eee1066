"""Error of rounded frozen layers against float64, on real models and rows: outputs and gradients, layer by layer.

    .venv/bin/python benchmarks/frozen_error.py [smollm2 minilm] [--formats int8 bf16]
        [--levers none smooth columns both] [--steps 200] [--rows 8] [--json FILE]

LoRA on every linear, as the suites eight-bit-lm and eight-bit-text train it, at its start and after --steps steps. One
training batch tells the outliers, the next one is measured, in eval mode:

    layers     linears that read one x together, with the x and dy that the unrounded model has there: outputs and dx of
               the rounded layers against float64
    gradients  of every adapter tensor, all layers rounded at once, against the same model in float64

Relative error is ‖ours − truth‖ / ‖truth‖. Padded positions are left out of the layers. Exits with 1 where the cosine
of a layer, in its outputs or its dx, is below 0.999.
"""

import argparse
import json
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peft_engine.adapters.fusing import fuse, unfuse
from peft_engine.adapters.fusing.freezing import Place, find_places
from peft_engine.adapters.fusing.outliers import Outliers, choose, collect
from peft_engine.adapters.group import Group
from peft_engine.bench.cells import settings_of
from peft_engine.bench.suite import load_suite
from peft_engine.building import build_group, encode_splits
from peft_engine.config import Config
from peft_engine.config_reading import load_config
from peft_engine.data.batching import BatchPlan
from peft_engine.data.loading import load_splits
from peft_engine.run import train
from peft_engine.runtime import hardware, start, versions
from peft_engine.tasks import Task, make_task
from peft_engine.tasks.base import Batch
from peft_engine.using import open_run
from peft_kernels.frozen_weight import freeze_siblings
from peft_kernels.lora_linear import Projection, lora_linears

ROOT = Path(__file__).resolve().parents[1]
SUITES = {"smollm2": "eight-bit-lm", "minilm": "eight-bit-text"}
LEAST = 0.999
"""Cosine of a layer's outputs and dx with float64's."""


@dataclass(frozen=True)
class Error:
    """Of a rounded tensor: cosine with the truth, and relative error."""

    cosine: float
    relative: float


@dataclass
class Layers:
    """Linears that read one x.

    Attributes:
        names: of them; weights: (N_i, K).
        x: (M, K); dys: (M, N_i), None where nothing flows back.
    """

    names: list[str]
    weights: list[Tensor]
    x: Tensor
    dys: list[Tensor | None]


def error(ours: Tensor, truth: Tensor) -> Error:
    """Both in float64, whatever they were."""
    a, b = ours.detach().double().flatten(), truth.detach().double().flatten()
    return Error(float(a @ b / (a.norm() * b.norm())), float((a - b).norm() / b.norm()))


def captured(group: Group, places: list[Place], stats: dict[str, Tensor], task: Task, batch: Batch) -> Iterator[Layers]:
    """The layers with their x and dy in the forward and backward of one batch, linears of one input together."""
    xs: dict[str, Tensor] = {}
    dys: dict[str, Tensor] = {}

    def keep_x(name: str) -> Callable[..., None]:
        return lambda module, inputs: xs.__setitem__(name, inputs[0].detach())

    def keep_dy(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            if output.requires_grad:
                output.register_hook(lambda dy: dys.__setitem__(name, dy.detach()))

        return hook

    handles: list[Any] = []
    for place in places:
        name, module = place.full_name, place.module
        handles.append(module.register_forward_pre_hook(keep_x(name)))
        whole = group.model.get_submodule(name.removesuffix(".base_layer"))  # whose output's gradient is its base's too
        handles.append(whole.register_forward_hook(keep_dy(name)))
    try:
        loss_of(group, task, batch).backward()
    finally:
        for handle in handles:
            handle.remove()
        group.model.zero_grad(set_to_none=True)
    real = batch["attention_mask"].flatten().bool()

    def rows(t: Tensor) -> Tensor:
        flat = t.reshape(-1, t.shape[-1])
        return flat[real] if len(flat) == len(real) else flat

    together: dict[int, list[Place]] = {}
    for place in places:
        if place.full_name in xs:
            together.setdefault(id(stats[place.full_name]), []).append(place)
    for members in together.values():
        names = [place.full_name for place in members]
        own = [rows(dys[name]) if name in dys else None for name in names]
        yield Layers(names, [place.weight for place in members], rows(xs[names[0]]), own)


def measured(layers: Layers, format: Any, lever: Outliers, spare: bool) -> dict[str, Any]:
    """Errors of the outputs, by linear, and of their common dx; `spare`: the largest columns of dy are not rounded."""
    held = freeze_siblings(layers.weights, format, smooth=lever.smooth, columns=lever.columns, spare_gradients=spare)
    x = layers.x.clone().requires_grad_()
    ys = lora_linears(x, [Projection(one) for one in held], backend="torch")
    truth = layers.x.double()
    found: dict[str, Any] = {
        "outputs": {
            name: vars(error(y, truth @ weight.double().T))
            for name, y, weight in zip(layers.names, ys, layers.weights, strict=True)
        },
        "columns": 0 if lever.columns is None else len(lever.columns),
        "dx": None,
    }
    live = [i for i, dy in enumerate(layers.dys) if dy is not None and bool(dy.any())]
    if live:
        dys = [dy for dy in layers.dys if dy is not None and bool(dy.any())]
        (dx,) = torch.autograd.grad([ys[i] for i in live], x, dys)
        wanted = torch.zeros_like(truth)
        for i, dy in zip(live, dys, strict=True):
            wanted += dy.double() @ layers.weights[i].double()
        found["dx"] = vars(error(dx, wanted))
    return found


def loss_of(group: Group, task: Task, batch: Batch) -> Tensor:
    """The mean loss of a batch in eval mode, with its graph."""
    group.activate(group.members[0])
    group.model.eval()
    return task.loss(task.forward(group.model, batch), batch) / len(batch["input_ids"])


def gradients(group: Group, task: Task, batch: Batch) -> dict[str, Tensor]:
    """Of every trained tensor of the member, float64."""
    tensors = group.members[0].tensors
    grads = torch.autograd.grad(loss_of(group, task, batch), list(tensors.values()))
    return {name: grad.double() for name, grad in zip(tensors, grads, strict=True)}


def settings(model: str, rows: int, steps: int, folder: Path) -> Config:
    """The full-precision run of the model's suite, with so many steps and rows in a step."""
    suite = load_suite(ROOT / "benchmarks" / "suites" / f"{SUITES[model]}.yaml")
    tree = settings_of(suite, "final", "lora", suite.seeds[0], suite.rates("lora")[0])
    tree["training"] |= {"steps": max(1, steps), "batch_size": rows, "eval_every": None}
    tree["data"]["limit"] |= {"eval": rows, "test": rows}
    return load_config({**tree, "output": str(folder / model)})


def prepared(config: Config) -> tuple[Group, Task, list[Batch]]:
    """The model as training starts, unfused, with the first two batches."""
    plain = config.model_copy(update={"kernels": "off"})
    runtime, splits = start(plain), load_splits(plain)
    task = make_task(plain, splits.labels)
    data = encode_splits(task, splits, plain)
    group = build_group(task, plain, runtime, data)
    plan = BatchPlan(data["train"].lengths, plain.training.batch_size, plain.training.seed, plain.data.group_by_length)
    return group, task, [task.collate(data["train"], plan.rows(step)) for step in (1, 2)]


def trained(config: Config) -> Group:
    """The same after training, its adapter ready to get gradients."""
    train(config, overwrite=True)
    group = open_run(config.output).group
    for tensor in group.members[0].tensors.values():
        tensor.requires_grad_(True)
    return group


def report(
    group: Group, task: Task, batches: list[Batch], formats: Iterable[str], levers: Iterable[str]
) -> Iterator[dict[str, Any]]:
    """All figures of one model at one time: {format, lever, layers, gradients}, one after another."""
    places, _ = find_places(group.model)
    stats = collect(group.model, [place.full_name for place in places], lambda: task.forward(group.model, batches[0]))
    layers = list(captured(group, places, stats, task, batches[1]))
    weights = {place.full_name: place.weight for place in places}
    group.model.double()
    truth = gradients(group, task, batches[1])
    group.model.float()
    for format in formats:
        for lever in levers if format != "bf16" else ["none"]:
            what = choose(stats, weights, lever)  # type: ignore[arg-type]
            found = [measured(one, format, what[one.names[0]], lever in ("columns", "both")) for one in layers]
            yield {
                "format": format,
                "lever": lever,
                "layers": found,
                "gradients": whole(group, task, batches, format, lever, truth),
            }


def whole(
    group: Group, task: Task, batches: list[Batch], format: Any, lever: Any, truth: dict[str, Tensor]
) -> dict[str, Any]:
    """Errors of every adapter tensor's gradient, and of all of them end to end, in the model frozen as in a run."""
    model = group.model
    places = [(place.module, place.module.weight) for place in find_places(model)[0]]
    settings: dict[str, Any] = {"frozen_outliers": lever, "calibrate": lambda: task.forward(model, batches[0])}
    report = fuse(model, "torch", format, **settings)
    try:
        found = gradients(group, task, batches[1])
    finally:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of rounded weights, which are put back below
            unfuse(model)
        for module, weight in places:
            module.weight = weight  # type: ignore[assignment]
    live = [name for name, grad in truth.items() if bool(grad.any())]
    ours, wanted = (torch.cat([of[name].flatten() for name in live]) for of in (found, truth))
    assert report.record is not None
    return {
        "all": vars(error(ours, wanted)),
        "tensors": {name: vars(error(found[name], truth[name])) for name in live},
        "above_bound": {name: e for name, e in report.record.errors.items() if name in report.kept_full},
    }


def told(found: dict[str, Any]) -> str:
    """One line for people."""
    outputs = [one for group in found["layers"] for one in group["outputs"].values()]
    dxs = [group["dx"] for group in found["layers"] if group["dx"]]
    cells = [f"{found['format']:5} {found['lever']:8}"]
    for name, errors in (("y", outputs), ("dx", dxs)):
        cosine, relative = min(one["cosine"] for one in errors), sorted(one["relative"] for one in errors)
        cells.append(
            f"{name}: cosine ≥ {cosine:.6f}, error {relative[len(relative) // 2]:.2%} median, {relative[-1]:.2%} worst"
        )
    ends = found["gradients"]["all"]
    cells.append(f"adapter gradients: cosine {ends['cosine']:.6f}, error {ends['relative']:.2%}")
    if above := found["gradients"]["above_bound"]:
        cells.append(f"{len(above)} linears kept full, the worst error {max(above.values()):.2%}")
    return "; ".join(cells)


def below(found: dict[str, Any]) -> list[str]:
    """Layers whose outputs or dx are not what they must be."""
    names = [n for one in found["layers"] for n, e in one["outputs"].items() if not e["cosine"] >= LEAST]
    return names + [
        f"dx of {', '.join(one['outputs'])}"
        for one in found["layers"]
        if one["dx"] and not one["dx"]["cosine"] >= LEAST
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help=f"{', '.join(SUITES)}; all by default")
    parser.add_argument("--formats", nargs="+", default=["int8", "bf16"])
    parser.add_argument("--levers", nargs="+", default=["none", "smooth", "columns", "both"])
    parser.add_argument("--steps", type=int, default=200, help="0 leaves the trained model out")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--json", dest="target", type=Path)
    args = parser.parse_args()
    if unknown := set(args.models) - set(SUITES):
        parser.error(f"no such model here: {', '.join(sorted(unknown))}; there are {', '.join(SUITES)}")
    record: dict[str, Any] = {"hardware": hardware(), "versions": versions(), "arguments": " ".join(sys.argv[1:])}
    bad: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        for model in args.models or SUITES:
            config = settings(model, args.rows, args.steps, Path(folder))
            group, task, batches = prepared(config)
            for steps in (0, args.steps) if args.steps else (0,):
                if steps:
                    group = trained(config)
                for found in report(group, task, batches, args.formats, args.levers):
                    print(f"{model} after {steps} steps: {told(found)}", flush=True)
                    bad += [f"{model}, {steps} steps, {found['format']} {found['lever']}: {n}" for n in below(found)]
                    record.setdefault("found", []).append({"model": model, "steps": steps, **found})
    if args.target:
        args.target.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    for line in bad:
        print(f"cosine below {LEAST}: {line}")
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
