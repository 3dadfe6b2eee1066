"""What a bench can't do is said before anything is trained, all of it at once."""

import copy
from pathlib import Path

import pytest
from tiny import write_rows

from peft_engine.bench.refusals import check_suite
from peft_engine.bench.suite import load_suite, suite_of
from peft_engine.errors import ConfigError
from suites import SUITE

SUITES = Path(__file__).resolve().parents[2] / "benchmarks/suites"
LANGUAGE = {"task": "causal-lm", "device": "cpu", "model": {"path": "model"}, "data": {"train": "rows.jsonl"}}


def suite(general_text=None, **config):
    """A suite of a language model; `data__test="x"` sets config.data.test."""
    tree = copy.deepcopy({**SUITE, "config": LANGUAGE, "general_text": general_text})
    for name, value in config.items():
        *above, last = name.split("__")
        node = tree["config"]
        for part in above:
            node = node.setdefault(part, {})
        node[last] = value
    return suite_of(tree)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (
            {"task": "dpo"},
            "got dpo, expected one of causal-lm, .*: methods are compared on single test rows",
        ),
        ({"task": "reward"}, "config.task: got reward"),
        ({"data__split": {"test": 0.0}}, "config.data.split.test: got 0, and config.data.test is not given"),
        ({"data__split": {"eval": 0.0}}, "config.data.split.eval: got 0, .*learning rates are chosen on that split"),
        (
            {"data__columns": {"text": "body"}, "evaluation": {"generate_rows": 4}},
            "config.evaluation.generate_rows: got 4, and the rows are plain text",
        ),
    ],
)
def test_what_the_settings_tell(config, said):
    with pytest.raises(ConfigError, match=said):
        check_suite(suite(**config))


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"data__test": "test.jsonl", "data__split": {"test": 0.0}},
        {"data__eval": "eval.jsonl", "data__split": {"eval": 0.0}},
        {"data__columns": {"text": "body"}},
        {"data__columns": {"prompt": "p", "completion": "c"}, "evaluation": {"generate_rows": 4}},
    ],
)
def test_what_can_be_judged_is_not_refused(config):
    check_suite(suite(**config))


@pytest.mark.parametrize(
    ("name", "command", "files"),
    [
        ("metamathqa-gsm8k", "gsm8k", ["metamathqa.jsonl", "gsm8k-valid.jsonl", "gsm8k-test.jsonl"]),
        ("litgpt-llama-3.2-3b", "alpaca2k", ["alpaca2k.jsonl"]),
        ("text8", "text8 --source text8", [f"text8-{part}.jsonl" for part in ("train", "valid", "test")]),
    ],
)
def test_data_that_a_script_makes(tmp_path, monkeypatch, name, command, files):
    published = load_suite(SUITES / f"published-{name}.yaml").model_copy(update={"published": None})
    monkeypatch.chdir(tmp_path)
    data = tmp_path / ".assets/data"
    write_rows(data / "vitaminc.jsonl", [{"text": "a"}])
    lacking = ", ".join(f".assets/data/{file}" for file in files)
    with pytest.raises(ConfigError) as caught:
        check_suite(published)
    assert f"there is no {lacking}; `python benchmarks/published/prepare.py {command}` makes" in str(caught.value)
    for file in files:
        write_rows(data / file, [{"text": "a"}])
    check_suite(published)


def test_general_text(tmp_path, tiny_model):
    path = tmp_path / "text.jsonl"
    text = {"path": str(path), "rows": 4, "max_length": 16}
    with pytest.raises(ConfigError, match=r"general_text: There is no file .*text\.jsonl"):
        check_suite(suite(text))
    write_rows(path, [{"words": "a b"}])
    with pytest.raises(ConfigError, match=r"general_text: .*neither text nor tokens, but words"):
        check_suite(suite(text))
    path.write_text('{"text": "half')
    with pytest.raises(ConfigError, match=r"general_text: .*text\.jsonl"):
        check_suite(suite(text))
    write_rows(path, [{"text": "a b"}])
    with pytest.raises(ConfigError, match=r"has 4 bytes, expected 4 windows of 16\. Lower general_text\.rows"):
        check_suite(suite(text))
    write_rows(path, [{"text": "the quick brown fox " * 5}])
    check_suite(suite(text))  # the model isn't there: the baseline cell counts
    with pytest.raises(ConfigError, match=r"has \d+ tokens, expected 4 windows of 16"):
        check_suite(suite(text, model__path=str(tiny_model("llama"))))
    write_rows(path, [{"text": "the quick brown fox " * 60}])
    check_suite(suite(text, model__path=str(tiny_model("llama"))))
    check_suite(suite({**text, "path": "some/hub-data"}))  # of which only the baseline cell knows


def test_all_faults_at_once(tmp_path):
    tree = {**SUITE, "config": {**LANGUAGE, "data": {"train": "rows.jsonl", "split": {"eval": 0.0, "test": 0.0}}}}
    tree["methods"] = {**SUITE["methods"], "odd": {"adapter": {"method": "lora", "rnak": 3}}}
    tree["general_text"] = {"path": str(tmp_path / "none.jsonl")}
    tree["published"] = {"path": str(tmp_path / "none.yaml")}
    with pytest.raises(ConfigError) as caught:
        check_suite(suite_of(tree))
    assert caught.value.exit_code == 2
    for part in ("methods.odd: adapter.rnak", "split.eval", "split.test", "none.jsonl", "none.yaml"):
        assert part in str(caught.value)
