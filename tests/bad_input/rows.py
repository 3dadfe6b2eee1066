"""Data that is not there, not readable, or not learnable."""

import gzip
from pathlib import Path

from tiny import class_rows

from .case import Case, inside, lines, model, rows_with, template, without

CASES = {
    "no such data file": Case("train c.yaml --set data.train=row.jsonl", 2, ("row.jsonl",), ("rows.jsonl",), cold=True),
    "no such evaluation file": Case("evaluate run-c --data gone.csv", 2, ("gone.csv",), ("rows.jsonl",)),
    "no such input": Case(
        "predict run-c --input row.jsonl --output out.csv", 2, ("row.jsonl",), ("rows.jsonl",), {"out.csv": "kept"}
    ),
    "data is a folder": Case(
        "train c.yaml --set data.train=folder", 2, ("folder",), ("name one file",), make=inside("folder", Path.mkdir)
    ),
    "no hub, offline": Case(
        "train c.yaml --set data.train=nobody/no-such-set", 2, ("nobody/no-such-set",), ("HF_HUB_OFFLINE",)
    ),
    "unknown format": Case(
        "train c.yaml --set data.train=./rows.xlsx", 2, ("rows.xlsx",), (".csv",), {"rows.xlsx": "x"}
    ),
    "wrong column": Case(
        "train c.yaml --set data.columns.text=txt", 3, ("'txt'", "rows.jsonl"), ("Did you mean 'text'",)
    ),
    "no label column": Case(
        "train c.yaml --set data.train=t.jsonl",
        3,
        ("t.jsonl", "label"),
        ("data.columns.label",),
        {"t.jsonl": lines({"text": "a", "mark": 1})},
    ),
    "predict without the column": Case(
        "predict run-c --input t.csv", 3, ("t.csv", "headline"), ("data.columns.text",), {"t.csv": "headline\na\n"}
    ),
    "one row without its label": Case(
        "train c.yaml --set data.train=t.jsonl",
        3,
        ("t.jsonl, line 5", "label"),
        ("Mend or remove",),
        {"t.jsonl": rows_with(4, label=...)},
    ),
    "NaN label": Case(
        "train c.yaml --set data.train=t.jsonl",
        3,
        ("t.jsonl, line 3", "nan"),
        ("Mend or remove",),
        {"t.jsonl": rows_with(2, label=float("nan"))},
    ),
    "blank text": Case(
        "train c.yaml --set data.train=t.jsonl",
        3,
        ("t.jsonl, line 9", "blank"),
        ("Mend or remove",),
        {"t.jsonl": rows_with(8, text="  ")},
    ),
    "text is a number": Case(
        "train c.yaml --set data.train=t.jsonl",
        3,
        ("t.jsonl, line 2", "17"),
        ("Mend or remove",),
        {"t.jsonl": rows_with(1, text=17)},
    ),
    "regression labels that are text": Case(
        "train c.yaml --set data.label_type=regression", 3, ("rows.jsonl, line 1", "'no'"), ("data.label_type",)
    ),
    "empty split": Case("train c.yaml --set data.split.eval=0.01", 3, ("eval", "0.01", "24"), ("data.split.eval=0",)),
    "empty file": Case("train c.yaml --set data.train=e.csv", 3, ("e.csv", "empty"), ("rows",), {"e.csv": ""}),
    "header alone": Case(
        "train c.yaml --set data.train=e.csv", 3, ("e.csv", "no rows"), ("holds some",), {"e.csv": "text,label\n"}
    ),
    "evaluation split of no rows": Case(
        "train c.yaml --set data.eval=e.jsonl", 3, ("e.jsonl", "no rows"), ("holds some",), {"e.jsonl": "\n\n"}
    ),
    "one class": Case(
        "train c.yaml --set data.train=t.jsonl",
        3,
        ("'no'", "24"),
        ("two classes",),
        {"t.jsonl": lines(*class_rows(24, ("no",)))},
    ),
    "label unseen in train": Case(
        "train c.yaml --set data.eval=t.jsonl",
        3,
        ("t.jsonl, line 2", "'maybe'"),
        ("'no', 'yes'",),
        {"t.jsonl": lines({"text": "new one", "label": "no"}, {"text": "new two", "label": "maybe"})},
    ),
    "label unseen in the run": Case(
        "evaluate run-c --data t.jsonl",
        3,
        ("t.jsonl, line 1", "'maybe'"),
        ("'no', 'yes'",),
        {"t.jsonl": lines({"text": "new", "label": "maybe"})},
    ),
    "all rows leak": Case(
        "train c.yaml --set data.test=t.jsonl",
        3,
        ("All 24 rows", "t.jsonl, line 1"),
        ("other rows",),
        {"t.jsonl": lines(*class_rows(24))},
    ),
    "not UTF-8": Case(
        "train c.yaml --set data.train=l.csv",
        3,
        ("l.csv, line 3", "0xe9"),
        ("iconv",),
        {"l.csv": "text,label\na,no\ncaf\xe9,yes\n".encode("latin-1")},
    ),
    "truncated JSONL": Case(
        "train c.yaml --set data.train=t.jsonl",
        3,
        ("t.jsonl, line 24", "breaks off"),
        ("Copy or download it again",),
        {"t.jsonl": rows_with(0)[:-20]},
    ),
    "broken JSON": Case(
        "train c.yaml --set data.train=t.jsonl",
        3,
        ("t.jsonl, line 2", "oops"),
        ("One JSON object per line",),
        {"t.jsonl": '{"text": "a", "label": 1}\noops}\n{"text": "b", "label": 2}\n'},
    ),
    "ragged CSV": Case(
        "train c.yaml --set data.train=r.csv",
        3,
        ("r.csv, line 3", "3 cells"),
        ("Quote",),
        {"r.csv": "text,label\na,no\nb, and c,yes\n"},
    ),
    "truncated gzip": Case(
        "train c.yaml --set data.train=z.jsonl.gz",
        3,
        ("z.jsonl.gz",),
        ("again",),
        {"z.jsonl.gz": gzip.compress(rows_with(0).encode())[:-30]},
    ),
    "corrupt Parquet": Case(
        "train c.yaml --set data.train=q.parquet", 3, ("q.parquet",), ("again",), {"q.parquet": b"PAR1 and no more"}
    ),
    "half of an emoji": Case(
        "train c.yaml --set data.train=t.jsonl",
        3,
        ("t.jsonl, line 1", "ud83d"),
        ("Remove",),
        {"t.jsonl": '{"text": "a \\ud83d", "label": 1}\n'},
    ),
    "longer than the model's positions": Case(
        "train p.yaml --set data.train=t.jsonl",
        2,
        ("data.max_length", "128 positions"),
        ("data.max_length: 128",),
        {"t.jsonl": lines(*({"prompt": f"{i} fox", "completion": "dog " * 200} for i in range(24)))},
    ),
    "no assistant turn": Case(
        "train m.yaml --set data.train=t.jsonl",
        3,
        ("t.jsonl, line 1", "assistant"),
        ("Mend or remove",),
        {"t.jsonl": lines({"messages": [{"role": "user", "content": "hi"}]})},
    ),
    "unknown role": Case(
        "train m.yaml --set data.train=t.jsonl",
        3,
        ("t.jsonl, line 1", "robot"),
        ("user, assistant",),
        {"t.jsonl": lines({"messages": [{"role": "robot", "content": "hi"}]})},
    ),
    "no chat template": Case(
        "train m.yaml --set model.path=model",
        2,
        ("chat template",),
        ("instruct model",),
        make=model("llama", without("chat_template.jinja")),
    ),
    "template refuses the roles": Case(
        "train m.yaml --set model.path=model",
        3,
        ("chats.jsonl, line", "roles must alternate"),
        ("Change the row",),
        make=model("llama", template("{{ raise_exception('roles must alternate') }}")),
    ),
    "template that is not Jinja": Case(
        "train m.yaml --set model.path=model",
        2,
        ("not valid Jinja",),
        ("Repair",),
        make=model("llama", template("{% for")),
    ),
    "all truncated away": Case(
        "train p.yaml --set data.max_length=2", 3, ("pairs.jsonl, line", "2 of"), ("data.max_length",)
    ),
}
