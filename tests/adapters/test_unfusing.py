"""`unfuse` refuses what it can't give back whole."""

import pytest
from families import adapt, batch_of, make, near, pair

from peft_engine.adapters.fusing import fuse, unfuse
from peft_engine.errors import ConfigError


def test_a_class_changed_since_is_not_overwritten() -> None:
    """As fully_shard does: it gives the module a subclass of whatever class it has."""
    model = adapt(make("llama"))
    fuse(model)
    layer = model.get_submodule("base_model.model.model.layers.0.mlp")
    fused = type(layer)
    layer.__class__ = type("FSDPLlamaMLP", (fused,), {})
    with pytest.raises(ConfigError, match=r"layers\.0\.mlp became a FSDPLlamaMLP after it was fused"):
        unfuse(model)
    assert isinstance(layer, fused)
    layer.__class__ = fused
    unfuse(model)
    assert type(layer).__mro__[1] is not fused


def test_logits_of_an_earlier_step_can_still_be_read() -> None:
    """They are made when asked for, which may be after the model was unfused."""
    model, plain = pair("llama")
    fuse(model)
    output = model(**batch_of("llama"))
    unfuse(model)
    near(output.logits.detach(), plain(**batch_of("llama")).logits.detach(), 1e-5)
