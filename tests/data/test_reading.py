"""Files and hub data sets become rows that know their place, or one clear error of the right class."""

import gzip
import json
import os
import subprocess
import sys

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest
from tiny import config, write_rows

from peft_engine.data.loading import load_splits
from peft_engine.data.reading import Rows, _read_hub, read_rows
from peft_engine.errors import ConfigError, DataError, StorageError

TABLE = [{"text": "naïve 😀", "label": "a"}, {"text": 'two\nlines, "quoted"', "label": ""}]
CSV = 'text,label\nnaïve 😀,a\n\n"two\nlines, ""quoted""",\n'


@pytest.fixture
def write(tmp_path):
    def write(name, content):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return write


def error_of(error_class, source):
    with pytest.raises(error_class) as caught:
        read_rows(source)
    assert type(caught.value) is error_class
    return str(caught.value)


def test_csv_cells_are_strings_and_rows_know_their_first_line(write):
    rows = read_rows(write("a.csv", CSV))
    assert rows.rows == TABLE
    assert rows.lines == [2, 4]
    assert rows.where(1).endswith("a.csv, line 4")
    assert rows.columns == ["text", "label"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", b"\xef\xbb\xbf" + CSV.encode()),
        ("a.CSV", CSV.replace("\n", "\r\n").replace("two\r\n", "two\n").encode()),
        ("a.tsv", CSV.replace("😀,a", "😀\ta").replace('""",', '"""\t').replace("text,", "text\t").encode()),
        ("a.csv.gz", gzip.compress(CSV.encode(), mtime=0)),
        ("a.jsonl", "\n".join(map(json.dumps, TABLE)).encode()),
        ("a.ndjson", "\r\n".join(json.dumps(row, ensure_ascii=False) for row in TABLE).encode() + b"\r\n"),
        ("a.jsonl.gz", gzip.compress("\n".join(map(json.dumps, TABLE)).encode(), mtime=0)),
        ("a.json", json.dumps(TABLE).encode()),
        ("b.json", json.dumps({"version": 1, "data": TABLE}, indent=2).encode()),
    ],
)
def test_every_text_format_gives_the_same_rows(write, name, content):
    assert read_rows(write(name, content)).rows == TABLE


def test_columnar_formats_give_the_same_rows(tmp_path):
    table = pa.Table.from_pylist(TABLE)
    pa.parquet.write_table(table, tmp_path / "a.parquet")
    with pa.OSFile(str(tmp_path / "file.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    with pa.OSFile(str(tmp_path / "stream.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    for name in ("a.parquet", "file.arrow", "stream.arrow"):
        rows = read_rows(str(tmp_path / name))
        assert rows.rows == TABLE
        assert rows.where(1).endswith(f"{name}, row 2")


def test_text_has_a_row_per_line_that_is_not_blank(write):
    rows = read_rows(write("a.txt", "first\r\n\n  \nnext\u2028same\n"))
    assert rows.rows == [{"text": "first"}, {"text": "next\u2028same"}]
    assert rows.lines == [1, 4]


def test_json_lines_are_not_cut_at_unicode_line_separators(write):
    rows = read_rows(write("a.jsonl", '{"text": "a\u2028b\u0085c"}\n\n{"text": "d"}\n'))
    assert [row["text"] for row in rows.rows] == ["a\u2028b\u0085c", "d"]
    assert rows.lines == [1, 3]


def test_a_cell_longer_than_pythons_csv_limit_is_read_and_the_limit_put_back(write):
    import csv

    before = csv.field_size_limit()
    assert len(read_rows(write("a.csv", "text\n" + "x" * (before + 10))).rows[0]["text"]) == before + 10
    assert csv.field_size_limit() == before


def test_columns_are_the_union_in_order_of_appearance():
    assert Rows("x", [{"b": 1}, {"a": 1, "b": 2}]).columns == ["b", "a"]


def test_nulls_of_messages_go_and_written_nulls_in_arguments_stay(write, tmp_path):
    call = {"function": {"name": "f", "arguments": {"unit": None}}}
    row = {"messages": [{"role": "assistant", "content": None, "tool_calls": [call]}], "label": None}
    assert read_rows(write("a.jsonl", json.dumps(row))).rows == [
        {"messages": [{"role": "assistant", "tool_calls": [call]}], "label": None}
    ]
    other = {
        "messages": [{"role": "user", "content": "hi", "tool_calls": [{"function": {"arguments": {"city": "x"}}}]}]
    }
    pa.parquet.write_table(pa.Table.from_pylist([row, other]), tmp_path / "a.parquet")
    filled = read_rows(str(tmp_path / "a.parquet")).rows[1]["messages"][0]["tool_calls"][0]
    assert filled == {"function": {"arguments": {"city": "x"}}}


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.csv", b"text\nok\ncaf\xe9\n", ["line 3", "0xe9", "offset 11", "iconv"]),
        ("a.csv", b"\xef\xbb\xbftext\ncaf\xe9\n", ["line 2", "offset 11"]),
        ("a.csv", "text\nä".encode("utf-16"), ["line 1", "UTF-16"]),
        ("a.csv", "text,label\na,b\nc\n", ["line 3", "1 cells", "2"]),
        ("a.csv", "text,label\na,b\nc,d,e\n", ["line 3", "3 cells"]),
        ("a.csv", 'text,label\na,b\n"c,d\ne,f\n', ["line 3", "unexpected end"]),
        ("a.tsv", 'text\tlabel\n"Hi" he said\t1\n', ["line 2", '"']),
        ("a.csv", "text,text\na,b\n", ["'text'", "more than once"]),
        ("a.csv", "text;label\na;b\n", ["'text;label'", "';'"]),
        ("a.csv", "text,label\n", ["no rows"]),
        ("a.csv", "", ["empty"]),
        ("a.jsonl", "\n\n", ["no rows"]),
        ("a.jsonl", '{"a": 1}\n{"a": }\n{"a": 2}\n', ["line 2", '{"a": }']),
        ("a.jsonl", '{"a": 1}\n{"a": "unfin', ["line 2", "truncated", "unfin"]),
        ("a.jsonl", '{"a": 1}\n{"a": "unfin\n', ["line 2", "truncated"]),
        ("a.jsonl", '{"a": 1}\n[1, 2]\n', ["line 2", "not a JSON object", "[1, 2]"]),
        ("a.jsonl", '[\n{"a": 1}\n]\n', ["line 1", ".json file"]),
        ("a.jsonl", '{"a": 1}\n{"a": "\\ud83d"}\n', ["line 2", "ud83d"]),
        ("a.jsonl", "[" * 100_000 + "\n{}\n", ["line 1", "not valid JSON"]),
        ("a.json", '[{"a": 1}, {"a": ', ["truncated"]),
        ("a.json", '{"a": 1}\n{"a": 2}\n', [".jsonl"]),
        ("a.json", '{"rows": []}', ["list of objects"]),
        ("a.json", '[{"a": 1}, 2]', ["row 2"]),
        ("a.json", "[]", ["no rows"]),
        ("a.json", '[{}, {"a": "\\uDC00"}]', ["row 2", "udc00"]),
        ("a.jsonl.gz", b"no gzip", ["decompressed"]),
        ("a.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 99, mtime=0)[:-12], ["decompressed"]),
        ("a.parquet", b"PAR1 no parquet", ["parquet"]),
        ("a.arrow", b"ARROW1 no arrow", ["arrow"]),
    ],
)
def test_faulty_content_is_a_data_error_with_its_place(write, name, content, expected):
    message = error_of(DataError, write(name, content))
    assert name in message
    for part in expected:
        assert part in message, message


def test_whole_surrogate_pairs_and_a_last_line_without_newline_are_fine(write):
    assert read_rows(write("a.jsonl", '{"a": "\\ud83d\\ude00"}')).rows == [{"a": "😀"}]


def test_a_missing_file_names_its_neighbours(write, tmp_path):
    write("train.jsonl", "{}")
    assert "train.jsonl" in error_of(ConfigError, str(tmp_path / "trian.jsonl"))
    assert "train.jsonl" in error_of(ConfigError, str(tmp_path / "zzz.csv"))
    assert "no folder" in error_of(ConfigError, str(tmp_path / "no" / "x.csv"))
    assert "There is no file" in error_of(ConfigError, str(tmp_path / "train.jsonl" / "x.csv"))


def test_a_folder_and_an_unknown_format_are_refused(write, tmp_path):
    table = write("table.xlsx", "x")
    assert ".parquet" in error_of(ConfigError, str(tmp_path))
    assert ".parquet" in error_of(ConfigError, table)
    write("rows.csv", "text\na\n")
    assert "rows.csv" in error_of(ConfigError, str(tmp_path))


@pytest.mark.parametrize(("file_mode", "folder_mode"), [(0o000, 0o755), (0o644, 0o600)])
def test_what_may_not_be_read_is_a_storage_error(tmp_path, file_mode, folder_mode):
    """In a child without privileges: root ignores file modes."""
    (tmp_path / "secret.csv").write_text("text\nx\n")
    (tmp_path / "secret.csv").chmod(file_mode)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.chdir(tmp_path)
            tmp_path.chmod(folder_mode)
            if os.getuid() == 0:
                os.setgid(65534)
                os.setuid(65534)
            read_rows("secret.csv")
        except StorageError as error:
            code = error.exit_code if "secret.csv" in str(error) and "ermission" in str(error) else 2
        finally:
            os._exit(code)
    status = os.waitpid(child, 0)[1]
    tmp_path.chmod(0o700)
    assert os.waitstatus_to_exitcode(status) == 8


def test_hub_splits_are_read_and_an_unknown_one_is_listed(tmp_path, monkeypatch):
    """Through `datasets`, on a folder that it takes for a data set."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "train.jsonl").write_text('{"m": [{"role": "user", "x": 1}, {"role": "tool"}]}\n')
    (folder / "test.jsonl").write_text('{"m": [{"role": "user", "x": 2}]}\n')
    assert _read_hub(str(folder), None, "train").rows == [{"m": [{"role": "user", "x": 1}, {"role": "tool"}]}]
    assert _read_hub(f"{folder}:test", None, "train").where(0) == f"{folder}:test, row 1"
    with pytest.raises(ConfigError, match=r"'dev'.*\['train', 'test'\].*name:split"):
        _read_hub(f"{folder}:dev", None, "train")
    with pytest.raises(ConfigError, match=r"'german'.*data\.subset"):
        _read_hub(str(folder), "german", "train")


def test_a_hub_name_offline_is_a_config_error_that_says_so():
    code = (
        "from peft_engine.data.reading import read_rows\n"
        "from peft_engine.errors import ConfigError\n"
        "try: read_rows('nobody/nothing:dev')\n"
        "except ConfigError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    for part in ("nobody/nothing", "'dev'", "HF_HUB_OFFLINE is set", "local file"):
        assert part in done.stdout


FEATURES = {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["cat", "dog", "fox"])}


def saved(folder, form, **columns):
    """A data set of the `datasets` library, as Parquet or as its own folder."""
    found = datasets.Dataset.from_dict(columns, features=datasets.Features({k: FEATURES[k] for k in columns}))
    if form == "folder":
        found.save_to_disk(str(folder / "saved"))
        return str(folder / "saved")
    found.to_parquet(folder / "rows.parquet")
    return str(folder / "rows.parquet")


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("form", ["folder", "parquet"])
def test_classes_have_the_names_that_datasets_keeps(tmp_path, form, streaming):
    source = saved(tmp_path, form, text=[f"row {i} of {i * i}" for i in range(40)], label=[i % 3 for i in range(40)])
    test = write_rows(
        tmp_path / "test.jsonl", [{"text": f"other {i}", "label": "catdogfox"[3 * i :][:3]} for i in (0, 1)]
    )
    data = {"test": str(test), "streaming": streaming, "cache": str(tmp_path / "cache")}
    splits = load_splits(config("text-classification", "m", source, tmp_path / "run", data=data))
    assert splits.labels.names == ["cat", "dog", "fox"]
    assert splits.report.counts["train"] + splits.report.counts["eval"] == 40
    assert any("cat, dog, fox" in note for note in splits.report.notes)


def test_names_of_lists_of_classes_and_rows_without_a_class(tmp_path):
    tags = datasets.Sequence(datasets.ClassLabel(names=["O", "B-X"]))
    features = datasets.Features({"ner_tags": tags, "label": FEATURES["label"], "n": datasets.Value("int64")})
    columns = {"ner_tags": [[0, 1], [-100, 1]], "label": [2, -1], "n": [0, 1]}
    datasets.Dataset.from_dict(columns, features=features).to_parquet(tmp_path / "rows.parquet")
    assert read_rows(str(tmp_path / "rows.parquet")).rows == [
        {"ner_tags": ["O", "B-X"], "label": "fox", "n": 0},
        {"ner_tags": [-100, "B-X"], "label": None, "n": 1},
    ]
