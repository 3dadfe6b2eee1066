"""Which layers run again in backward."""

from typing import Any

import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from peft_engine.errors import ConfigError
from peft_engine.levers.checkpointing import checkpoint_layers

LAYERS = 5


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"vocab_size": 61, "hidden_size": 16, "num_hidden_layers": LAYERS, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**shape, intermediate_size=24, num_key_value_heads=1, use_cache=False)).train()


def ran(model: Any, ids: torch.Tensor) -> list[int]:
    """How often each layer's MLP ran in forward and backward."""
    calls = [0] * LAYERS

    def count(number: int) -> Any:
        return lambda *_: calls.__setitem__(number, calls[number] + 1)

    hooks = [layer.mlp.register_forward_pre_hook(count(i)) for i, layer in enumerate(model.model.layers)]
    model(input_ids=ids, labels=ids).loss.backward()
    for hook in hooks:
        hook.remove()
    return calls


@pytest.mark.parametrize(
    ("chosen", "twice", "told"),
    [
        (True, [0, 1, 2, 3, 4], "all 5 layers"),
        (1, [0, 1, 2, 3, 4], "5 of 5 layers"),
        (2, [0, 2, 4], "3 of 5 layers"),
        (3, [0, 3], "2 of 5 layers"),
        (9, [0], "1 of 5 layers"),
        ([r"layers\.[34]$"], [3, 4], "2 of 5 layers"),
        (["0$", r"layers\.(0|2)$"], [0, 2], "2 of 5 layers"),
    ],
)
def test_chosen_layers_run_again_and_gradients_stay(chosen: Any, twice: list[int], told: str) -> None:
    ids = torch.randint(0, 61, (2, 7), generator=torch.Generator().manual_seed(1))
    plain, model = llama(), llama()
    plain(input_ids=ids, labels=ids).loss.backward()
    assert checkpoint_layers(model, chosen) == told
    assert ran(model, ids) == [2 if i in twice else 1 for i in range(LAYERS)]
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad), name


def test_a_second_choice_takes_the_place_of_the_first() -> None:
    model, ids = llama(), torch.zeros(1, 4, dtype=torch.int64)
    checkpoint_layers(model, True)
    checkpoint_layers(model, ["4$"])
    assert ran(model, ids) == [1, 1, 1, 1, 2]


def test_what_can_not_be_chosen_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"layers\.9 finds none of the model's 5 layers, named model\.layers\.0"):
        checkpoint_layers(llama(), ["0$", "layers.9"])
    model = llama()
    model.supports_gradient_checkpointing = False
    with pytest.raises(ConfigError, match="LlamaForCausalLM does not support it"):
        checkpoint_layers(model, 2)


def test_every_stack_counts_for_itself() -> None:
    shape = {"vocab_size": 61, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_heads": 2}
    model = T5ForConditionalGeneration(T5Config(**shape, num_layers=3, num_decoder_layers=2))
    assert checkpoint_layers(model, 2) == "3 of 5 layers"
    assert [layer.gradient_checkpointing for layer in model.encoder.block] == [True, False, True]
    assert [layer.gradient_checkpointing for layer in model.decoder.block] == [True, False]


def test_encoders_too() -> None:
    shape = {"vocab_size": 61, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
    model = BertForSequenceClassification(BertConfig(**shape, intermediate_size=24))
    assert checkpoint_layers(model, 2) == "2 of 3 layers"
    assert [layer.gradient_checkpointing for layer in model.bert.encoder.layer] == [True, False, True]
