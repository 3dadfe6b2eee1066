"""What a suite may say, and what its cells are."""

import copy
from pathlib import Path

import pytest

from peft_engine.bench.cells import baseline_cell, file_digest, final_cells, method_faults, tuning_cells
from peft_engine.bench.suite import load_suite, suite_of, to_yaml
from peft_engine.config_reading import load_config
from peft_engine.errors import ConfigError
from suites import SUITE

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = sorted((ROOT / "benchmarks/suites").glob("*.yaml"))


def changed(**places):
    """`SUITE` with `a__b=value` put in."""
    tree = copy.deepcopy(SUITE)
    for name, value in places.items():
        *above, last = name.split("__")
        node = tree
        for part in above:
            node = node.setdefault(part, {})
        node[last] = value
    return tree


@pytest.mark.parametrize(
    ("tree", "said"),
    [
        (changed(sead=[1]), "sead: no such setting; did you mean seeds"),
        (changed(methods__lora__learning_rate=1), "methods.lora.learning_rate: no such setting; did you mean"),
        (changed(budget={}), "budget: expected exactly one of steps, epochs and tokens"),
        (changed(budget={"steps": 1, "epochs": 2}), "exactly one"),
        (changed(budget={"steps": "many"}), "budget.steps: got 'many'"),
        (changed(reference="fool"), "reference: got fool, expected one of the methods: full, lora"),
        (changed(seeds=[-1, 0]), r"seeds\[0\]: got -1: Input should be greater than or equal to 0"),
        (changed(seeds=[0, 2**70]), r"seeds\[1\]: got 1180591620717411303424: Input should be less than 4294967296"),
        (changed(tuning={"seed": 2**32}), "tuning.seed: got 4294967296"),
        (changed(primary="rows"), "primary: got rows, which is no metric"),
        (changed(seeds=[1, 1]), "seeds: .* repeats itself"),
        (changed(seeds=[0, 1000]), "tuning.seed: 1000 is among seeds"),
        (changed(config__output="runs/x"), "config.output: a suite does not take it"),
        (changed(config__training__seed=3), "config.training.seed: a suite does not take it: say it under seeds"),
        (changed(config__training__early_stopping={"patience": 2}), "early_stopping: a suite does not take it"),
        (changed(methods__lora__training={"steps": 3}), "methods.lora.training.steps: a suite does not take it"),
        (changed(methods__lora__training={"batch_size": 3}), "batch_size: must be the same for every method"),
        (changed(general_text={"path": "x"}), "general_text: measures language models"),
        (changed(methods__baseline={"adapter": {"method": "full"}}), "methods.baseline: this name is"),
        (changed(methods={}), "methods"),
        (changed(config__training=[]), "config.training: got \\[\\], expected settings written"),
        (changed(config__data="x"), "config.data: got 'x', expected settings written"),
        (changed(usd_per_hour=0, price_source="x"), "usd_per_hour: got 0"),
        (changed(usd_per_hour=1.5), "price_source: is missing; say where usd_per_hour is from"),
    ],
)
def test_faults_of_a_suite(tree, said):
    with pytest.raises(ConfigError, match=said):
        suite_of(tree)


def test_all_faults_at_once_with_their_lines(tmp_path):
    path = tmp_path / "suite.yaml"
    path.write_text("name: x\ntitel: y\nbudget:\n  steps: 0\n")
    with pytest.raises(ConfigError) as caught:
        load_suite(path)
    text = str(caught.value)
    assert f"{path}, line 2: titel: no such setting; did you mean title?" in text
    assert f"{path}, line 4: budget.steps: got 0" in text
    assert "title: is missing" in text


def test_a_suite_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match="can't be read"):
        load_suite(tmp_path / "none.yaml")


def test_faults_of_methods_are_told_with_their_names():
    tree = changed(methods__lora__adapter={"method": "lora", "rnak": 3}, methods__full__adapter={"method": "fulll"})
    told = "\n".join(method_faults(suite_of(tree)))
    assert "methods.lora: adapter.rnak" in told
    assert "methods.full: adapter.method" in told


def test_cells_of_a_suite():
    suite = suite_of(changed(config__evaluation={"batch_size": 64}))
    search, finals = tuning_cells(suite, "lora"), final_cells(suite, "lora", 1e-3)
    assert [cell.learning_rate for cell in search] == [1e-4, 1e-3, 1e-2]
    assert tuning_cells(suite, "full") == [], "one rate is taken as it is"
    one = search[0].config
    assert (one["training"]["steps"], one["training"]["seed"], one["data"]["limit"]["test"]) == (3, 1000, 8)
    last = finals[1].config
    assert (last["training"]["steps"], last["training"]["seed"], last["data"]["limit"]["test"]) == (6, 1, None)
    assert last["training"]["learning_rate"] == 1e-3
    for cell in [*search, *finals, baseline_cell(suite)]:
        load_config({**cell.config, "output": "x"})
    keys = {cell.key for cell in [*search, *finals]}
    assert len(keys) == 5
    assert finals[0].name.startswith("lora-final-0-0.001-")


def test_a_key_is_of_what_decides_the_result():
    key = final_cells(suite_of(SUITE), "lora", 1e-3)[0].key
    same = changed(title="Another", minutes=9, primary="loss", tuning__share=0.25, methods__lora__learning_rates=[1.0])
    same |= {"usd_per_hour": 0.5, "price_source": "a list"}
    assert final_cells(suite_of(same), "lora", 1e-3)[0].key == key
    for other in (changed(config__data__max_length=9), changed(budget={"steps": 7}), changed(config__kernels="off")):
        assert final_cells(suite_of(other), "lora", 1e-3)[0].key != key


def test_digests_of_files(tmp_path):
    assert file_digest(str(tmp_path / "org/model")) is None
    (tmp_path / "a").write_text("1")
    first = file_digest(str(tmp_path))
    (tmp_path / "a").rename(tmp_path / "b")
    assert file_digest(str(tmp_path)) != first
    (tmp_path / "b").write_text("22")
    assert len({first, file_digest(str(tmp_path)), file_digest(str(tmp_path / "b"))}) == 3


def test_a_suite_is_written_as_it_is_read(tmp_path):
    suite = suite_of(SUITE)
    (tmp_path / "suite.yaml").write_text(to_yaml(suite))
    assert load_suite(tmp_path / "suite.yaml") == suite


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_suites(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    suite = load_suite(path)
    assert method_faults(suite) == []
    assert suite.name == path.stem
    assert len(suite.seeds) >= 3
    assert suite.minutes or suite.published, "its own machine decides how long a published table takes"
