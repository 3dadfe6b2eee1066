"""Which modules an adapter goes on, and what a name that matches nothing gets."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny import class_rows, config, pair_rows, write_rows

from peft_engine.adapters.targets import find_modules_to_save, find_targets, shorten
from peft_engine.backbone import Backbone
from peft_engine.config import AdapterConfig
from peft_engine.data.splitting import load_splits
from peft_engine.errors import ConfigError
from peft_engine.runtime import start
from peft_engine.tasks import make_task

Load = Callable[..., Backbone]


@pytest.fixture
def load(tiny_model: Callable[[str], Path], tmp_path: Path) -> Load:
    def backbone(family: str, task: str = "causal-lm", pooling: str = "auto") -> Backbone:
        rows = write_rows(tmp_path / "rows.jsonl", pair_rows(8) if task == "causal-lm" else class_rows(8))
        model = {"pooling": pooling} if task != "causal-lm" else {}
        settings = config(task, tiny_model(family), rows, tmp_path / "out", model=model)
        return make_task(settings, load_splits(settings).labels).load(start(settings).device)

    return backbone


def adapter(**settings: Any) -> AdapterConfig:
    return AdapterConfig(**settings)


LLAMA_LAYER = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
LLAMA_LAYER += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]


def test_all_linear_is_every_matrix_but_the_output_head(load: Load) -> None:
    wanted = [f"model.layers.{i}.{name}" for i in (0, 1) for name in LLAMA_LAYER]
    assert find_targets(load("llama"), adapter()) == wanted
    assert find_targets(load("llama", "text-classification"), adapter()) == wanted  # not `score`
    found = find_targets(load("gpt2"), adapter())
    assert found == [
        f"transformer.h.{i}.{name}" for i in (0, 1) for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    ]


def test_all_linear_in_an_encoder(load: Load) -> None:
    own = find_targets(load("bert", "text-classification"), adapter())
    assert len(own) == 2 * 6 + 1
    assert "bert.pooler.dense" in own
    assert "classifier" not in own
    mean = find_targets(load("bert", "text-classification", "mean"), adapter())
    assert len(mean) == 2 * 6
    assert not any("pooler" in name or "classifier" in name for name in mean)


def test_a_list_names_endings(load: Load) -> None:
    found = find_targets(load("llama"), adapter(targets=["q_proj", "mlp.down_proj"]))
    assert found == [f"model.layers.{i}.{name}" for i in (0, 1) for name in ("self_attn.q_proj", "mlp.down_proj")]
    # an ending is whole components: `proj` or `_proj` is none
    with pytest.raises(ConfigError, match="'_proj' matches no module"):
        find_targets(load("llama"), adapter(targets=["_proj"]))


def test_an_expression_matches_whole_names(load: Load) -> None:
    found = find_targets(load("llama"), adapter(targets=r".*layers\.1\..*(q|v)_proj"))
    assert found == ["model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.v_proj"]
    with pytest.raises(ConfigError, match="matches no module"):
        find_targets(load("llama"), adapter(targets=r"layers\.1\..*q_proj"))


def test_layers_narrow_the_targets(load: Load) -> None:
    found = find_targets(load("gpt2"), adapter(layers=[1]))
    assert [name for name in found if ".h.1." in name] == found
    assert len(found) == 4
    with pytest.raises(ConfigError, match="layer 2; layers are 0 to 1"):
        find_targets(load("gpt2"), adapter(layers=[0, 2]))


@pytest.mark.parametrize(
    ("settings", "problem", "near"),
    [
        ({"targets": ["q_prj"]}, "'q_prj' matches no module", "q_proj"),
        ({"targets": ["q_proj", "value"]}, "'value' matches no module", "v_proj"),
        ({"targets": ".*query"}, "'.*query' matches no module", "q_proj"),
        ({"rank_pattern": {"vproj": 8}}, "adapter.rank_pattern: 'vproj' matches none of the 14 adapted", "v_proj"),
        ({"targets": ["q_proj"], "alpha_pattern": {"v_proj": 8.0}}, "adapter.alpha_pattern: 'v_proj'", "q_proj"),
    ],
)
def test_a_name_that_matches_nothing_gets_the_near_ones(
    settings: dict[str, Any], problem: str, near: str, load: Load
) -> None:
    with pytest.raises(ConfigError) as raised:
        find_targets(load("llama"), adapter(**settings))
    assert problem in str(raised.value)
    assert near in str(raised.value)


def test_modules_to_save_must_exist(load: Load) -> None:
    backbone = load("llama")
    assert find_modules_to_save(backbone, ["embed_tokens", "lm_head"]) == ["embed_tokens", "lm_head"]
    with pytest.raises(ConfigError, match="'lm_haed' matches no module") as raised:
        find_modules_to_save(backbone, ["lm_haed"])
    assert "Nearest: lm_head" in str(raised.value)


def test_a_new_head_is_always_saved(load: Load) -> None:
    assert find_modules_to_save(load("bert", "text-classification"), []) == ["classifier"]
    assert find_modules_to_save(load("llama", "text-classification"), ["norm"]) == ["norm", "score"]


def test_short_names_only_where_they_select_the_same(load: Load) -> None:
    backbone = load("llama")
    everything = find_targets(backbone, adapter())
    assert shorten(everything, backbone) == sorted({name.rpartition(".")[2] for name in everything})
    first = find_targets(backbone, adapter(layers=[0]))
    assert shorten(first, backbone) == first
