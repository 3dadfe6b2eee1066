"""transformers' attention with a fused rotation of queries and keys, and with dropout that is named and cheap.

Its forward looks two names up in its module: the rotation and the table of attention functions. The subclass runs the
same code with other values for these names; the library itself is left alone.
"""

import inspect
import types
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from peft_kernels._launch import Backend
from peft_kernels.dropout import dropout as drop
from peft_kernels.dropped_attention import dropped_attention
from peft_kernels.rope import rope

from .probing import is_half_rotation
from .state import ATTRIBUTE, once_each, original_class, state_of

ROTATION = "apply_rotary_pos_emb"
TABLE = "ALL_ATTENTION_FUNCTIONS"


def attention_class(module: nn.Module, backend: Backend) -> tuple[str, type[nn.Module] | str] | None:
    """(op, class) for a module whose forward rotates or attends, (op, reason) where its rotation is another one."""
    cls = original_class(module)
    forward: Any = inspect.unwrap(cls.forward)
    names = getattr(getattr(forward, "__code__", None), "co_names", ())
    if not any("rotary_pos_emb" in name for name in names) and not (TABLE in names and drops_in_attention(module)):
        return None
    if not isinstance(cls.forward, types.FunctionType) or forward is not cls.forward:
        return "rope", "its forward is wrapped by a decorator"
    if any("rotary_pos_emb" in name for name in names):
        if ROTATION not in names or not is_half_rotation(forward.__globals__.get(ROTATION)):
            return "rope", "its rotary embedding is not the one that turns halves"
        return "rope", _attention(cls, backend)
    return "attention dropout", _attention(cls, backend)


def drops_in_attention(module: Any) -> bool:
    """Whether a rate of dropout for attention probabilities stands on the module, as in transformers' attentions."""
    rates = [getattr(module, name, None) for name in ("attention_dropout", "dropout_prob", "dropout", "attn_dropout")]
    return any(
        (rate.p if isinstance(rate, nn.Dropout) else rate if isinstance(rate, float) else 0) > 0 for rate in rates
    )


@once_each
def _attention(cls: type[nn.Module], backend: Backend) -> type[nn.Module]:
    forward: Any = cls.forward
    other: dict[str, Any] = {}
    if ROTATION in forward.__code__.co_names:
        other[ROTATION] = partial(_rotate, forward.__globals__[ROTATION], backend)
    if TABLE in forward.__code__.co_names and TABLE in forward.__globals__:
        other[TABLE] = _Table(forward.__globals__[TABLE])
    own = types.FunctionType(
        forward.__code__, {**forward.__globals__, **other}, forward.__name__, forward.__defaults__, forward.__closure__
    )
    own.__kwdefaults__ = forward.__kwdefaults__

    def fused(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or ATTRIBUTE not in self.__dict__:
            return forward(self, *args, **kwargs)  # the compiler looks names up in the module, and fuses by itself
        return own(self, *args, **kwargs)

    fused.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
    names = {"forward": fused, "__module__": cls.__module__, "__qualname__": cls.__qualname__}
    return type(cls.__name__, (cls,), names)


def _rotate(
    plain: Any, backend: Backend, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
) -> tuple[Tensor, Tensor]:
    partial_ = cos.shape[-1] != q.shape[-1] or q.shape[0] != k.shape[0] or q.shape[2:] != k.shape[2:]
    if unsqueeze_dim != 1 or q.dim() != 4 or cos.dim() != 3 or cos.requires_grad or sin.requires_grad or partial_:
        rotated: tuple[Tensor, Tensor] = plain(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)
        return rotated
    return rope(q, k, cos, sin, backend=backend)


class _Table:
    """Stands for transformers' table of attention functions inside one forward."""

    def __init__(self, table: Any) -> None:
        self.table = table

    def __getattr__(self, name: str) -> Any:
        return getattr(self.table, name)

    def __getitem__(self, name: str) -> Any:
        return partial(attend, self.table[name]) if name == "sdpa" else self.table[name]

    def get_interface(self, name: str, default: Any) -> Any:
        plain = self.table.get_interface(name, default)
        return partial(attend, plain) if name == "sdpa" else plain


def attend(
    plain: Any,
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' `sdpa_attention_forward`; with dropout on a CPU, by products, softmax and a named mask.

    torch has no flash kernel with dropout there: it makes the probabilities too, and draws a number for each of them,
    which takes longer than all the products.

    Args:
        query: (B, H, T, D); key, value: (B, Hkv, S, D).
        attention_mask: bool (True attends) or additive, broadcast to (B, H, T, S); None.

    Returns:
        (B, T, H, D), None.
    """
    asked = any(kwargs.get(name) is not None for name in ("position_bias", "cache", "softcap"))
    if not dropout or query.device.type != "cpu" or asked or ATTRIBUTE not in module.__dict__:
        result: tuple[Tensor, None] = plain(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
        )
        return result
    state = state_of(module)
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if attention_mask is None and causal and query.shape[2] > 1:
        attention_mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril()
    if _keeps_no_probabilities(query, key, value, attention_mask):
        if attention_mask is not None:
            attention_mask = attention_mask[(None,) * (4 - attention_mask.dim())]
        seeds = state.rows.of(query, state.salt)
        y = dropped_attention(query, key, value, attention_mask, dropout, seeds, state.salt, scale=scale)
        return y.transpose(1, 2).contiguous(), None
    scores = torch.matmul(query * scale, key.transpose(2, 3))
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attention_mask, -torch.inf)
    elif attention_mask is not None:
        scores = scores + attention_mask
    # a row that may look nowhere gets zeros, as in torch's own attention
    probabilities = torch.ops.aten._safe_softmax(scores, -1) if _blind(attention_mask) else scores.softmax(-1)
    kept = drop(probabilities, dropout, state.rows.of(query, state.salt), state.salt, backend=state.backend)
    return torch.matmul(kept, value.to(kept.dtype)).transpose(1, 2).contiguous(), None


def _keeps_no_probabilities(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> bool:
    """Whether the fused form takes these: wide plain tensors of one dtype, and a mask that does not train."""
    kinds = {t.dtype for t in (query, key, value)}
    autocast = torch.is_autocast_enabled("cpu") and query.dtype != torch.float64
    plain = len(kinds) == 1 and kinds <= {torch.float32, torch.float64} and not autocast
    return plain and not (mask is not None and mask.requires_grad) and not torch.compiler.is_compiling()


def _blind(mask: Tensor | None) -> bool:
    if mask is None:
        return False
    seen = mask if mask.dtype == torch.bool else mask > -torch.inf
    return not bool(seen.any(-1).all())
