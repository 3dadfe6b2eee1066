"""Data of the published tables as JSONL with the engine's columns, for the suites `published-*.yaml`.

    python benchmarks/published/prepare.py gsm8k              MetaMathQA to train on, GSM8K to judge by (hub)
    python benchmarks/published/prepare.py alpaca2k           litgpt's 2,000 rows of Alpaca (hub)
    python benchmarks/published/prepare.py text8 --source text8    the file of mattmahoney.net/dc/text8.zip, unpacked

Files go to .assets/data. GLUE needs none of this: its suites read the hub data set by its own columns.
"""

import argparse
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / ".assets" / "data"
Row = dict[str, Any]

METAMATH_CHARACTERS = 1300  # of question and answer; PEFT's harness leaves longer rows out
GSM8K_VALIDATION = 50
TEXT8_PARTS = {"train": 90_000_000, "valid": 5_000_000, "test": 5_000_000}  # characters, in this order
TEXT8_ROW = 100_000  # characters of a row: long, so that the end token that closes each costs next to nothing


def question(text: str) -> str:
    """The prompt of PEFT's comparison, which the answer follows without a space."""
    return f"Question: {text} Think step by step.\nAnswer:"


def metamath_rows(rows: Iterable[Row]) -> Iterator[Row]:
    """MetaMathQA (query, response, type, original_question) → prompt, completion; long rows are left out."""
    for row in rows:
        if len(f"{row['query']} {row['response']}") <= METAMATH_CHARACTERS:
            yield {"prompt": question(row["query"]), "completion": row["response"]}


def gsm8k_rows(rows: Iterable[Row]) -> Iterator[Row]:
    """GSM8K (question, answer) → prompt, completion. The answer ends with `#### number`."""
    for row in rows:
        yield {"prompt": question(row["question"]), "completion": row["answer"]}


def gsm8k_validation(rows: list[Row]) -> list[Row]:
    """Rows of GSM8K's training split that PEFT's harness validates on: the first 50 of NumPy's shuffle, seed 0."""
    order = np.arange(len(rows))
    np.random.RandomState(0).shuffle(order)
    return [rows[i] for i in order[:GSM8K_VALIDATION]]


def alpaca_rows(rows: Iterable[Row]) -> Iterator[Row]:
    """Alpaca (instruction, input, output) → prompt, completion, in the form of the Stanford Alpaca release."""
    for row in rows:
        with_input = (
            "Below is an instruction that describes a task, paired with an input that provides further context. "
        )
        without = "Below is an instruction that describes a task. "
        asked = "Write a response that appropriately completes the request.\n\n"
        shown = f"### Instruction:\n{row['instruction']}\n\n"
        given = f"### Input:\n{row['input']}\n\n" if row.get("input") else ""
        prompt = f"{with_input if given else without}{asked}{shown}{given}### Response:\n"
        yield {"prompt": prompt, "completion": row["output"]}


def text8_parts(text: str, sizes: dict[str, int], row: int = TEXT8_ROW) -> dict[str, list[Row]]:
    """The text in its customary parts, each in rows of about `row` characters that end before a space.

    No character is lost or changed: the rows of a part, one after another, are the part. Raises ValueError where the
    text is shorter than its parts, or holds anything but a to z and spaces.
    """
    if len(text) < sum(sizes.values()):
        raise ValueError(f"text8: got {len(text):,} characters, expected {sum(sizes.values()):,}")
    if strange := set(text) - set("abcdefghijklmnopqrstuvwxyz "):
        raise ValueError(f"text8 holds a to z and spaces only, got {sorted(strange)[:5]}")
    found, start = {}, 0
    for name, size in sizes.items():
        part, start = text[start : start + size], start + size
        rows, at = [], 0
        while at < len(part):
            space = part.rfind(" ", at + 1, at + row + 1)
            end = len(part) if len(part) - at <= row else space if space > at else at + row
            rows.append({"text": part[at:end]})
            at = end
        found[name] = rows
    return found


def write(path: Path, rows: Iterable[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    with part.open("w", encoding="utf-8") as file:
        count = 0
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
    part.replace(path)
    print(f"{path.name}: {count:,} rows")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("gsm8k", "alpaca2k", "text8"))
    parser.add_argument("--source", type=Path, help="text8: the unpacked file")
    parser.add_argument("--folder", type=Path, default=DATA)
    arguments = parser.parse_args()
    if arguments.what == "text8":
        if arguments.source is None or not arguments.source.is_file():
            parser.error("text8: give the unpacked file with --source")
        try:
            parts = text8_parts(arguments.source.read_text(encoding="ascii"), TEXT8_PARTS)
        except ValueError as error:
            parser.error(str(error))
        for name, rows in parts.items():
            write(arguments.folder / f"text8-{name}.jsonl", rows)
        return
    from datasets import load_dataset

    if arguments.what == "alpaca2k":
        write(
            arguments.folder / "alpaca2k.jsonl", alpaca_rows(load_dataset("mhenrichsen/alpaca_2k_test", split="train"))
        )
        return
    write(arguments.folder / "metamathqa.jsonl", metamath_rows(load_dataset("meta-math/MetaMathQA", split="train")))
    held = gsm8k_validation(list(load_dataset("openai/gsm8k", "main", split="train")))
    write(arguments.folder / "gsm8k-valid.jsonl", gsm8k_rows(held))
    write(arguments.folder / "gsm8k-test.jsonl", gsm8k_rows(load_dataset("openai/gsm8k", "main", split="test")))


if __name__ == "__main__":
    main()
