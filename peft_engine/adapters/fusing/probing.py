"""What a small module computes, found by running its own forward on small random numbers. Never by its name.

A probe is an object of the module's class with the module's settings and tiny tensors of its own, so that it works for
models on any device, `meta` included, and changes nothing.
"""

import copy
import inspect
import itertools
import types
from collections.abc import Callable
from typing import Any, get_args

import torch
from torch import Tensor, nn

from peft_kernels.activation import Kind, activation_reference
from peft_kernels.glu import Gate, glu_reference
from peft_kernels.rms_norm import rms_norm_reference
from peft_kernels.rope import rope_reference

from .state import original_class

KINDS = get_args(Kind)
ACTIVATIONS = get_args(Gate)
WIDTH = 12
ROWS = 100  # enough for a dropout of 1% to show


def _probe(module: nn.Module, **parts: Any) -> nn.Module:
    """An object of the module's own class and settings, with `parts` for its children and parameters."""
    probe: nn.Module = object.__new__(original_class(module))
    nn.Module.__init__(probe)
    own = set(probe.__dict__)
    probe.__dict__.update(
        {k: v for k, v in module.__dict__.items() if k not in own and not k.startswith("_peft_engine")}
    )
    for name, part in parts.items():
        setattr(probe, name, part)
    return probe


def _gives(module: nn.Module, *inputs: Tensor) -> Tensor | None:
    """Its output; None where it fails, gives something else than a tensor, or something else while it trains."""
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            out, trained = (module.train(mode)(*inputs) for mode in (False, True))
    except Exception:  # whatever somebody's module raises on a probe, it is not the module we look for
        return None
    return out if isinstance(out, Tensor) and isinstance(trained, Tensor) and torch.equal(out, trained) else None


def _random(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(20)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).mul_(2).to(dtype)


def _takes_one(module: Any) -> bool:
    """Whether its forward has one input and nothing that could change what it does."""
    if not isinstance(module, nn.Module):
        return True
    return len(inspect.signature(original_class(module).forward).parameters) == 2  # self and x


def _rows() -> Tensor:
    """Inputs of an MLP, (2, ROWS, 5): from small to so large that a clamp would show."""
    return _random(2, ROWS, 5) * torch.logspace(-1, 3, ROWS, dtype=torch.float64).unsqueeze(1)


def _close(got: Tensor | None, want: Tensor) -> bool:
    """Equal to 1e-10 of the largest number in each row."""
    if got is None or got.shape != want.shape:
        return False
    return bool(((got - want).abs() <= 1e-10 * (1e-3 + want.abs().amax(-1, keepdim=True))).all())


def activation_kind(module: Any) -> str | None:
    """Which activation of `peft_kernels.activation` a module or function is: equal to 1e-12 on a grid."""
    if isinstance(module, nn.Module) and (any(True for _ in module.parameters()) or module._modules):
        return None
    if not _takes_one(module):
        return None
    far = torch.tensor([10.0, 11, 20, 51, 100, 1001, 1e5], dtype=torch.float64)  # clipped kinds differ out there
    x = torch.cat([torch.linspace(-9, 9, 1001, dtype=torch.float64), far, -far])
    call: Any = _probe(module) if isinstance(module, nn.Module) else module
    got = _gives(call, x) if isinstance(call, nn.Module) else _called(call, x)
    if got is None or got.shape != x.shape or got.dtype != x.dtype:
        return None
    return next(
        (kind for kind in KINDS if torch.allclose(got, activation_reference(x, kind), rtol=1e-12, atol=1e-12)), None
    )


def _called(function: Callable[..., Any], x: Tensor) -> Tensor | None:
    try:
        out = function(x)
    except Exception:  # see _gives
        return None
    return out if isinstance(out, Tensor) else None


def rms_norm_settings(module: nn.Module) -> dict[str, Any] | None:
    """eps, offset and cast with which `peft_kernels.rms_norm` equals this module, None where it doesn't."""
    if module._modules or module._buffers or not _takes_one(module):
        return None
    tensors = dict(module.named_parameters(recurse=False))
    eps = next(
        (getattr(module, n) for n in ("variance_epsilon", "eps") if isinstance(getattr(module, n, None), float)), None
    )
    if eps is None or set(tensors) - {"weight"} or any(t.dim() != 1 for t in tensors.values()):
        return None
    for offset, cast in ((0.0, "llama"), (1.0, "gemma"), (0.0, "gemma")):
        if all(_is_rms_norm(module, bool(tensors), eps, offset, cast, d) for d in (torch.float32, torch.bfloat16)):
            return {"eps": eps, "offset": offset, "cast": cast}
    return None


def _is_rms_norm(module: nn.Module, weighted: bool, eps: float, offset: float, cast: Any, dtype: torch.dtype) -> bool:
    x, weight = _random(64, WIDTH, dtype=dtype), _random(WIDTH, dtype=dtype)
    probe = _probe(module, **({"weight": nn.Parameter(weight)} if weighted else {}))
    if isinstance(probe, nn.RMSNorm):
        probe.normalized_shape = (WIDTH,)
    got = _gives(probe, x)
    want = rms_norm_reference(x, weight if weighted else None, eps, offset=offset, cast=cast)
    if got is None or got.dtype != want.dtype or got.shape != want.shape:
        return False
    # in bf16 the two orders of casting differ in most elements, in fp32 only rounding is left
    return torch.equal(got, want) if dtype == torch.bfloat16 else torch.allclose(got, want, rtol=1e-5, atol=1e-6)


def _split(module: nn.Module, linears: int) -> tuple[dict[str, nn.Module], list[str], Any] | None:
    """(activation modules, names of linears, kind of activation) of a module that holds just these; else None."""
    children = dict(module.named_children())
    kinds = {name: activation_kind(child) for name, child in children.items()}
    acts = {name: child for name, child in children.items() if kinds[name] in ACTIVATIONS}
    names = [name for name in children if name not in acts]
    if not _takes_one(module) or len(names) != linears or len(acts) > 1 or not _all_linear(children, names):
        return None
    functions = (v for v in module.__dict__.values() if isinstance(v, types.FunctionType))
    kind = next((kinds[name] for name in acts), None) or next(map(activation_kind, functions), None)
    return (acts, names, kind) if kind in ACTIVATIONS else None


def _run(module: nn.Module, acts: dict[str, nn.Module], parts: dict[str, nn.Linear], x: Tensor) -> Tensor | None:
    return _gives(_probe(module, **parts, **{name: copy.deepcopy(act) for name, act in acts.items()}), x)


def gated_mlp(module: nn.Module) -> dict[str, str] | None:
    """Names of gate, up, down and the activation's kind, where the module computes down(act(gate(x)) * up(x))."""
    split = _split(module, 3)
    if split is None:
        return None
    (acts, names, kind), x = split, _rows()
    for gate, up, down in itertools.permutations(names):
        parts = {gate: _linear(5, 7, 0), up: _linear(5, 7, 1), down: _linear(7, 5, 2)}
        if _close(_run(module, acts, parts, x), parts[down](glu_reference(parts[gate](x), parts[up](x), kind))):
            return {"gate": gate, "up": up, "down": down, "activation": kind}
    return None


def packed_mlp(module: nn.Module) -> dict[str, str] | None:
    """The same for one linear that makes gate and up together (Phi-3)."""
    split = _split(module, 2)
    if split is None:
        return None
    (acts, names, kind), x = split, _rows()
    for packed, down in itertools.permutations(names):
        parts = {packed: _linear(5, 14, 0), down: _linear(7, 5, 2)}
        gate, up = parts[packed](x).chunk(2, -1)
        if _close(_run(module, acts, parts, x), parts[down](glu_reference(gate, up, kind))):
            return {"packed": packed, "down": down, "activation": kind}
    return None


def _all_linear(children: dict[str, nn.Module], names: list[str]) -> bool:
    return all(isinstance(getattr(children[name], "base_layer", children[name]), nn.Linear) for name in names)


def _linear(features: int, out: int, seed: int) -> nn.Linear:
    layer = nn.Linear(features, out, bias=False, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(
            torch.randn(out, features, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        )
    return layer


def is_half_rotation(function: Any) -> bool:
    """Whether `function(q, k, cos, sin)` rotates halves as `peft_kernels.rope` does."""
    q, k = _random(2, 4, 3, 8), _random(2, 2, 3, 8)
    cos, sin = _random(2, 3, 8), _random(2, 3, 8) + 1
    try:
        got = function(q, k, cos, sin)
    except Exception:  # see _gives
        return False
    want = rope_reference(q, k, cos, sin)
    return len(got) == 2 and all(torch.allclose(g, w, rtol=1e-12, atol=1e-12) for g, w in zip(got, want, strict=True))
