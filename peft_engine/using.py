"""Use a finished run: evaluate, predict, generate; `export` is in a file of its own."""

import csv
import io
import json
import logging
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import numpy as np

from .building import refuse_too_long
from .config_checks import PREFERENCE
from .data.cleaning import Dropped
from .data.loading import encode_split, load_splits, without_looking
from .data.reading import Rows
from .data.splitting import Split, load_one
from .errors import ConfigError, DataError
from .evaluation import evaluate_split, predict_rows
from .export_run import export as export
from .generation import generate_text, prompt_and_answer
from .opening import Opened, of_run, open_run
from .run_directory import find_run, storage_errors, write_whole
from .tasks import TASKS
from .tasks.base import Generates
from .tasks.seq2seq import Seq2Seq


def evaluate(
    path: str | Path,
    split: Literal["train", "eval", "test"] = "test",
    *,
    data: str | None = None,
    overrides: tuple[str, ...] = (),
) -> dict[str, Any]:
    """Metrics of a run's adapter on one of its splits, or on a file with the same columns.

    Returns:
        {"split", "rows", "metrics"}, rows being those judged; where others were left out, because `data.clean` lets
        them go or they teach nothing, also their number "dropped", "dropped_kinds" and "dropped_first".
    """
    _, config = find_run(path, overrides)
    if config.task in PREFERENCE:
        raise ConfigError(
            f"evaluate: a {config.task} run is judged against its reference, which only training holds.",
            "Its metrics before and after are in run.json; use predict or generate.",
        )
    if data is not None:  # what may be faulty is read before what takes time
        chosen, _ = load_one(data, config, need_label=True, default_split="test")
    else:
        found = getattr(load_splits(without_looking(config)), split)
        if found is None:
            raise ConfigError(f"This run has no {split} split.", "Name another with --split, or a file with --data.")
        chosen = found
    opened = open_run(path, overrides)
    encoded = encode_split(chosen, opened.task.encode, opened.task.fingerprint(), config.data.max_dropped, None)
    refuse_too_long(opened.group.backbone.model, {"rows": encoded})
    size = config.evaluation.batch_size or config.training.batch_size
    with opened.group.evaluating(opened.group.members[0]) as model:
        metrics = evaluate_split(model, opened.task, encoded, size, opened.runtime)
        if config.evaluation.generate_rows and isinstance(opened.task, Generates):
            examples = [chosen.examples[i] for i in encoded.read()[: config.evaluation.generate_rows]]
            metrics |= opened.task.judge_answers(model, examples, config.evaluation, size)
    gone = chosen.dropped if data is not None else []
    gone = gone + [Dropped(split, chosen.where[i], "teaches nothing", reason) for i, reason in encoded.dropped]
    rows = len(chosen.examples) - len(encoded.dropped)
    return {"split": data or split, "rows": rows, **_left_out(gone), "metrics": metrics}


def _left_out(gone: list[Dropped]) -> dict[str, Any]:
    if not gone:
        return {}
    kinds = dict(Counter(row.kind for row in gone))
    first = [asdict(next(row for row in gone if row.kind == kind)) for kind in kinds]
    return {"dropped": len(gone), "dropped_kinds": kinds, "dropped_first": first}


def predict(
    path: str | Path, source: str, target: str | Path | None = None, *, overrides: tuple[str, ...] = ()
) -> list[dict[str, Any]]:
    """Predict every row of a file: class and probabilities, or generated text.

    Args:
        source: file with the text (or prompt, messages, image) columns of training, or a folder of images; labels are
            not needed.
        target: .csv or .jsonl to write; the source's columns are kept.

    Returns:
        The rows, each with `predicted` (and `probabilities` for classes).
    """
    target = Path(target).expanduser() if target else None
    suffix = target.suffix if target else ".jsonl"
    if suffix not in (".csv", ".jsonl"):
        raise ConfigError(f"output {target}: got {suffix or 'no ending'}, expected .csv or .jsonl.", "Name it so.")
    if target and target.resolve() == Path(source).expanduser().resolve():
        raise ConfigError(f"output {target} is the input.", "Name another file.")
    if target and not target.absolute().parent.is_dir():
        raise ConfigError(f"output {target}: there is no folder {target.parent}.", "Make it, or name another.")
    _, config = find_run(path, overrides)
    split, rows = load_one(source, config, need_label=False, default_split="test")
    for name in rows.columns:
        if name in ("predicted", "probabilities") or name.startswith("probability."):
            raise DataError(f"{source} has a column {name!r}, which the predictions would replace.", "Rename it.")
    opened = open_run(path, overrides)
    task = opened.task
    found = _texts(opened, task, split) if isinstance(task, Generates) else _predictions(opened, split)
    result = [{**_writable(rows, i), **prediction} for i, prediction in enumerate(found)]
    if target:
        with storage_errors(target):
            write_whole(target, _as_csv(result) if suffix == ".csv" else _as_jsonl(result))
    return result


def generate(
    path: str | Path,
    prompt: str,
    *,
    system: str | None = None,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    streamer: Any = None,
    overrides: tuple[str, ...] = (),
) -> str:
    """Continue a prompt, through the chat template where the run learned conversations; or make the target of a source.

    Raises:
        ConfigError: no finished run that answers with text, or nothing to answer.
    """
    folder, config = find_run(path, overrides)
    if not issubclass(TASKS[config.task], Generates):
        raise ConfigError(f"generate needs a run that answers with text, {folder} is {config.task}.", "Use predict.")
    if not prompt.strip():
        raise ConfigError("The prompt is empty.", "Give some text to answer.")
    opened = open_run(path, overrides)
    tokenizer = opened.task.processor
    templated = not isinstance(opened.task, Seq2Seq) and of_run(folder, "data", "conversations")
    if system and not templated:
        raise ConfigError("--system needs a run that learned conversations.", "Put it into the prompt.")
    messages = [*([{"role": "system", "content": system}] if system else []), {"role": "user", "content": prompt}]
    text = prompt_and_answer({"messages": messages}, tokenizer)[0] if templated else prompt
    with opened.group.evaluating(opened.group.members[0]) as model:
        make = streamer(tokenizer) if streamer else None
        if isinstance(opened.task, Seq2Seq):
            return opened.task.generate(model, [text], max_new_tokens, temperature=temperature, streamer=make)[0]
        return generate_text(
            model, tokenizer, [text], max_new_tokens, templated=templated, temperature=temperature, streamer=make
        )[0]


def _predictions(opened: Opened, split: Split) -> list[dict[str, Any]]:
    encoded = encode_split(split, opened.task.encode, {}, 0.0, None)
    if encoded.truncated:
        cut = f"{encoded.truncated} of {len(encoded)} rows were cut to data.max_length"
        lost = "; words beyond it are predicted as null" if "words" in encoded.columns else ""
        logging.getLogger(__name__).warning("%s = %d tokens%s.", cut, opened.config.data.max_length, lost)
    refuse_too_long(opened.group.backbone.model, {"rows": encoded})
    size = opened.config.evaluation.batch_size or opened.config.training.batch_size
    with opened.group.evaluating(opened.group.members[0]) as model:
        return predict_rows(model, opened.task, encoded, size, opened.runtime)


def _texts(opened: Opened, task: Generates, split: Split) -> list[dict[str, Any]]:
    settings = opened.config.evaluation
    size = settings.batch_size or opened.config.training.batch_size
    with opened.group.evaluating(opened.group.members[0]) as model:
        return [{"predicted": text} for text in task.answers(model, list(split.examples), settings, size)]


def _writable(rows: Rows, i: int) -> dict[str, Any]:
    """A row without the pixels or encoded bytes of its images: where it stands is written in their place."""
    return {name: rows.where(i) if _holds_image(value) else value for name, value in rows.rows[i].items()}


def _holds_image(value: Any) -> bool:
    return isinstance(value, bytes | np.ndarray) or (isinstance(value, dict) and isinstance(value.get("bytes"), bytes))


def _as_jsonl(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _is_cell(value: Any) -> bool:
    return isinstance(value, str | int | float) and not isinstance(value, bool)


def _as_csv(rows: list[dict[str, Any]]) -> str:
    flat = []
    for row in rows:
        by_class = isinstance(row.get("probabilities"), dict)  # words of a tagged row have a list
        shares = row["probabilities"] if by_class else {}
        plain = {
            k: "" if v is None else v if _is_cell(v) else json.dumps(v, ensure_ascii=False)
            for k, v in row.items()
            if k != "probabilities" or not by_class
        }
        flat.append(plain | {f"probability.{name}": share for name, share in shares.items()})
    out = io.StringIO()
    writer = csv.DictWriter(out, fieldnames=list(dict.fromkeys(key for row in flat for key in row)))
    writer.writeheader()
    writer.writerows(flat)
    return out.getvalue()
