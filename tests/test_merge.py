"""Adapter arithmetic against fp64 sums, in plain peft, and through the verbs that use a run."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from comparing import changed
from peft import PeftModel
from safetensors.torch import load_file
from tiny import chat_rows, class_rows, config, make_model, write_rows
from transformers import AutoModelForCausalLM

from peft_engine.cli import cli
from peft_engine.config import Config
from peft_engine.errors import ConfigError
from peft_engine.merging import merge
from peft_engine.run import train
from peft_engine.using import evaluate, export, generate, open_run, predict

TRAINING = {"steps": 4, "batch_size": 8, "learning_rate": 0.02}


def chat(model: Path, folder: Path, output: str, **adapter: Any) -> Config:
    rows = write_rows(folder / f"{output}.jsonl", chat_rows(24)[len(output) % 3 :])
    return config(
        "causal-lm", model, rows, folder / output, adapter={"rank": 4, **adapter}, training=TRAINING,
        data={"split": {"eval": 0.2, "test": 0.0}},
    )  # fmt: skip


@pytest.fixture(scope="module")
def runs(tiny_model, tmp_path_factory) -> Path:
    """Runs on one llama: a and bb of rank 4, wide of rank 6, rs with rsLoRA and ranks of its own, of which two."""
    folder = tmp_path_factory.mktemp("runs")
    train(chat(tiny_model("llama"), folder, "a"))
    train(changed(chat(tiny_model("llama"), folder, "bb"), training__seed=3))
    train(chat(tiny_model("llama"), folder, "wide", rank=6, targets=["q_proj", "down_proj", "embed_tokens"]))
    for name in ("rs", "rs2"):
        train(chat(tiny_model("llama"), folder, name, rslora=True, rank_pattern={"v_proj": 2}))
    return folder


def deltas(run: Path) -> dict[str, torch.Tensor]:
    """Module → scale·B·A in fp64, from the files alone."""
    tensors = load_file(run / "adapter/adapter_model.safetensors")
    settings = json.loads((run / "adapter/adapter_config.json").read_text())
    found = {}
    for name, a in tensors.items():
        if "lora_A" not in name and "lora_embedding_A" not in name:
            continue
        b = tensors[name.replace("lora_A", "lora_B").replace("embedding_A", "embedding_B")]
        module = name.split(".lora_")[0]
        rank = next((r for key, r in (settings["rank_pattern"] or {}).items() if module.endswith(key)), settings["r"])
        assert a.shape[0] == b.shape[1] == rank
        scale = settings["lora_alpha"] / (rank**0.5 if settings["use_rslora"] else rank)
        found[module] = scale * (b.double() @ a.double())
    return found


def weighted(folder: Path, sources: list[tuple[str, float]]) -> dict[str, torch.Tensor]:
    total: dict[str, torch.Tensor] = {}
    for name, weight in sources:
        for module, delta in deltas(folder / name).items():
            total[module] = total.get(module, 0) + weight * delta
    return total


def joined(folder: Path, sources: list[tuple[str, float]]) -> list[tuple[str, float]]:
    return [(str(folder / name), weight) for name, weight in sources]


@pytest.mark.parametrize(
    "sources",
    [
        [("a", 0.7), ("bb", 0.3)],
        [("a", 1.0), ("bb", -0.5), ("wide", 2.0)],
        [("rs", 0.5), ("rs2", 0.25)],
        [("rs", 0.5), ("a", 0.25)],
    ],
    ids=str,
)
def test_cat_is_the_weighted_sum(sources, runs, tmp_path):
    found = merge(joined(runs, sources), tmp_path / "out")
    wanted, have = weighted(runs, sources), deltas(tmp_path / "out")
    assert have.keys() == wanted.keys()
    for module, delta in wanted.items():
        assert torch.allclose(have[module], delta, rtol=1e-5, atol=1e-6 * float(delta.abs().max())), module
    assert found["distance"] < 1e-6
    assert found["rank"] == sum(6 if name == "wide" else 4 for name, _ in sources)


def test_svd_is_the_best_of_its_rank(runs, tmp_path):
    sources = [("a", 0.7), ("bb", 0.3)]
    for rank in (3, 8, 16):  # 16 is all that the narrow k and v of grouped queries have
        found = merge(joined(runs, sources), tmp_path / str(rank), method="svd", rank=rank)
        wanted, have = weighted(runs, sources), deltas(tmp_path / str(rank))
        lost = total = 0.0
        for module, delta in wanted.items():
            values = torch.linalg.svdvals(delta)
            error = float((have[module] - delta).norm())
            assert error == pytest.approx(float(values[rank:].norm()), rel=1e-3, abs=1e-5 * float(values[0]))
            lost, total = lost + error**2, total + float(delta.norm()) ** 2
        assert found["distance"] == pytest.approx((lost / total) ** 0.5, rel=1e-3)
    assert found["distance"] < 1e-5


def test_linear_is_what_peft_documents(runs, tmp_path):
    """Products of sums, not the sum of products: the distance says how far that is."""
    found = merge(joined(runs, [("a", 0.7), ("bb", 0.3)]), tmp_path / "out", method="linear")
    one, two, have = (
        load_file(p / "adapter/adapter_model.safetensors") for p in (runs / "a", runs / "bb", tmp_path / "out")
    )
    scale = 32 / 4
    for name, tensor in have.items():
        expected = (0.7 * scale) ** 0.5 * one[name].double() + (0.3 * scale) ** 0.5 * two[name].double()
        assert torch.allclose(tensor.double(), expected, rtol=1e-5, atol=1e-6)
    assert found["distance"] > 0.01


@pytest.mark.parametrize("method", ["ties", "dare_linear", "dare_ties_svd", "magnitude_prune"])
def test_pruning_methods_run_and_repeat_themselves(method, runs, tmp_path):
    sources = joined(runs, [("a", 0.5), ("bb", 0.5)])
    files = []
    for name, seed in (("one", 0), ("two", 0), ("other", 1)):
        merge(sources, tmp_path / name, method=method, density=0.5, seed=seed)
        files.append((tmp_path / name / "adapter/adapter_model.safetensors").read_bytes())
    assert files[0] == files[1]
    assert (files[0] != files[2]) == method.startswith("dare")


def test_the_result_is_a_run_for_all_that_use_one(runs, tmp_path):
    sources = [("rs", 0.5), ("rs2", 0.5)]
    merge(joined(runs, sources), tmp_path / "out")
    assert evaluate(tmp_path / "out", "eval")["metrics"]["tokens"] > 0
    assert isinstance(generate(tmp_path / "out", "the quick fox", max_new_tokens=3), str)
    assert export(tmp_path / "out")[1].relative < 1e-3
    again = merge([(str(tmp_path / "out"), 1.0), (str(runs / "a"), 1.0)], tmp_path / "again")
    assert again["rank"] == 12
    record = json.loads((tmp_path / "out/run.json").read_text())["merged"]
    assert [(s["path"], s["weight"]) for s in record["sources"]] == joined(runs, sources)
    assert "| 0.5 |" in (tmp_path / "out/adapter/README.md").read_text()
    base = AutoModelForCausalLM.from_pretrained(open_run(runs / "rs").config.model.path)
    plain = PeftModel.from_pretrained(base, str(tmp_path / "out/adapter"))
    modules = dict(plain.named_modules())
    for module, delta in weighted(runs, sources).items():
        assert torch.allclose(modules[module].get_delta_weight("default").double(), delta, rtol=1e-4, atol=1e-5)


def test_the_sum_of_rounded_runs_stands_on_full_weights(runs, tmp_path):
    """Nothing was trained with the sum: there is no record of what to round, and no need to."""
    of = chat(Path(open_run(runs / "a").config.model.path), tmp_path, "rounded")
    model = of.model.model_copy(update={"frozen_compute": "int8", "frozen_outliers": "smooth", "frozen_head": "int8"})
    train(of.model_copy(update={"model": model}))
    merge([(str(tmp_path / "rounded"), 0.5), (str(runs / "a"), 0.5)], tmp_path / "out")
    assert open_run(tmp_path / "out").config.model.frozen_compute == "full"
    assert evaluate(tmp_path / "out", "eval")["metrics"]["tokens"] > 0


def test_heads_are_not_added_up(tiny_model, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", class_rows(30))
    for name in ("one", "two"):
        train(config(
            "text-classification", tiny_model("bert"), rows, tmp_path / name, adapter={"rank": 2},
            training={**TRAINING, "seed": len(name) + (name == "two")},
        ))  # fmt: skip
    sources = [(str(tmp_path / name), 0.5) for name in ("one", "two")]
    with pytest.raises(ConfigError, match=r"trained .*classifier.* in full, each its own.*--head"):
        merge(sources, tmp_path / "out")
    with pytest.raises(ConfigError, match="is none of the runs"):
        merge(sources, tmp_path / "out", head="three")
    assert not (tmp_path / "out").exists()
    merge(sources, tmp_path / "out", head=sources[1][0])
    saved, theirs = (load_file(tmp_path / n / "adapter/adapter_model.safetensors") for n in ("out", "two"))
    heads = [name for name in theirs if "classifier" in name]
    assert heads
    assert all(torch.equal(saved[name], theirs[name]) for name in heads)
    write_rows(tmp_path / "new.jsonl", [{"text": "a cat"}])
    assert predict(tmp_path / "out", str(tmp_path / "new.jsonl"))[0]["predicted"] in ("no", "yes")
    assert export(tmp_path / "out")[1].relative < 1e-3


def test_the_verb(runs, tmp_path):
    words = [f"{runs / 'a'}=0.7", str(runs / "bb"), "--to", str(tmp_path / "out"), "--method", "svd", "--rank", "3"]
    found = json.loads(CliRunner().invoke(cli, ["merge", *words, "--json"]).stdout)
    assert (found["folder"], found["rank"]) == (str(tmp_path / "out"), 3)
    sources = json.loads((tmp_path / "out/run.json").read_text())["merged"]["sources"]
    assert [s["weight"] for s in sources] == [0.7, 1.0]
    words[0] = f"{runs / 'a'}=half"
    with pytest.raises(ConfigError, match="expected RUN=WEIGHT with a finite number"):
        CliRunner().invoke(cli, ["merge", *words], catch_exceptions=False)


@pytest.mark.parametrize(
    ("names", "more", "said"),
    [
        (["a"], {}, r"got 1 run\(s\), expected two or more"),
        (["a", "bb"], {"method": "mean"}, "got method 'mean', expected one of cat, svd"),
        (["a", "bb"], {"method": "ties"}, "ties needs a density"),
        (["a", "bb"], {"density": 0.5}, "cat takes no density"),
        (["a", "bb"], {"method": "ties", "density": 1.5}, "must be above 0 and at most 1"),
        (["a", "bb"], {"rank": 3}, "the rank follows from the sources with cat"),
        (["a", "wide"], {"method": "linear"}, "peft refuses this: All adapters must have the same r"),
        (["a", "nothing"], {}, "There is no run"),
        (["a", "wide"], {"method": "svd", "rank": 64}, r"rank 64 is more than svd can give \S*k_proj, 16 wide.*"),
    ],
)
def test_what_does_not_fit_together_is_refused(names, more, said, runs, tmp_path):
    with pytest.raises(ConfigError, match=said):
        merge(joined(runs, [(name, 1.0) for name in names]), tmp_path / "out", **more)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("weight", "said"),
    [
        (float("inf"), "got weight inf for .*, expected a finite number"),
        (float("nan"), "got weight nan for .*, expected a finite number"),
        (1e300, r"got weight 1e.300 for .*, expected a finite number that fp32 holds"),
        (3e38, r"lora_A.weight of the sum is not finite; the weights were 3e.38, 1"),
    ],
)
def test_a_sum_that_is_not_finite_is_refused(weight, said, runs, tmp_path):
    with pytest.raises(ConfigError, match=said):
        merge(joined(runs, [("a", weight), ("bb", 1.0)]), tmp_path / "out")
    words = ["merge", f"{runs / 'a'}={weight}", str(runs / "bb"), "--to", str(tmp_path / "out")]
    with pytest.raises(ConfigError, match="finite"):
        CliRunner().invoke(cli, words, catch_exceptions=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("adapter", "seed", "said"),
    [
        ({"method": "bitfit"}, 0, "trained with adapter.method bitfit"),
        ({"rank": 2, "dora": True}, 0, "it uses DoRA"),
        ({"rank": 2, "bias": "all"}, 0, "it also trained .*bias"),
        ({"rank": 2}, 7, "other weights of the backbone"),
    ],
)
def test_adapters_that_do_not_add_up_are_refused(adapter, seed, said, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", chat_rows(12))
    for name, own, weights in (("one", {"rank": 2}, 0), ("two", adapter, seed)):
        model = make_model("qwen2", tmp_path / f"model-{weights}", seed=weights)
        train(config("causal-lm", model, rows, tmp_path / name, adapter=own, training={**TRAINING, "steps": 1}))
    with pytest.raises(ConfigError, match=said):
        merge([(str(tmp_path / "one"), 1.0), (str(tmp_path / "two"), 1.0)], tmp_path / "out")
