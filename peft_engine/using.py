"""Use a finished run: open its adapter, then evaluate, predict, generate or export."""

import csv
import io
import json
import logging
import math
import os
import shutil
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from .adapters.files import load_adapter
from .adapters.fusing import FrozenRecord, fuse, row_seeds
from .adapters.fusing.frozen_record import FILE, read_record
from .adapters.group import Group
from .adapters.lora import move_weights_again, moves_weights
from .adapters.new_rows import with_new_tokens
from .building import refuse_too_long
from .config import Config
from .config_checks import LABELLED, PREFERENCE
from .data.cleaning import Dropped
from .data.encoding import EncodedSet, cache_folder
from .data.labels import Labels
from .data.loading import encode_split, load_splits
from .data.reading import Rows
from .data.splitting import Split, load_one
from .drift import MAX_KL, Drift, HeldOut, compare, held_out
from .errors import ConfigError, DataError, EngineError, StorageError
from .evaluation import evaluate_split, predict_rows
from .exporting import LABELS, compare_on_probe, export_merged, read_labels, verify_adapter
from .generation import generate_text, prompt_and_answer
from .run_directory import IN_FULL, find_run, storage_errors, write_whole
from .runtime import Runtime, start, versions
from .tasks import TASKS, Task, make_task
from .tasks.base import Generates
from .tasks.items import item_kind
from .tasks.seq2seq import Seq2Seq

MERGE = "merge.json"


@dataclass
class Opened:
    """A run's adapter on its backbone, ready for use."""

    folder: Path
    config: Config
    labels: Labels | None
    task: Task
    runtime: Runtime
    group: Group


def open_run(path: str | Path, overrides: tuple[str, ...] = ()) -> Opened:
    """Load the adapter of a run.

    Args:
        path: the run directory, or the config whose `output` it is.

    Raises:
        ConfigError: there is no finished run, or its weights were rounded to a format that this device lacks.
        StorageError: its adapter is damaged, or not this model's; what was decided about frozen linears is missing.
    """
    folder, config = find_run(path, overrides)
    labels = read_labels(folder / "adapter")
    if labels is None and config.task in LABELLED:
        raise StorageError(f"{folder / 'adapter' / LABELS} is missing.", "Restore it, or train again.")
    runtime = start(config)
    task = make_task(config, labels)
    backbone = with_new_tokens(task.load(runtime.device), task.processor, config)
    group = load_adapter(backbone, config, folder / "adapter")
    if config.model.frozen_compute != "full":
        _freeze_as_trained(group, config, read_record(folder / FILE, _of_run(folder, "digests").get("frozen")))
    return Opened(folder, config, labels, task, runtime, group)


def _freeze_as_trained(group: Group, config: Config, record: FrozenRecord) -> None:
    """Round the weights that were rounded in training, so that outputs are those that were trained.

    Raises:
        ConfigError: this device lacks the format.
    """
    if record.format is None:
        return
    if config.adapter.method == "lora" and moves_weights(config.adapter.init):
        move_weights_again(group.model, group.members[0].spec.name, record.frozen)
    group.fused = fuse(group.model, "torch" if config.kernels == "torch" else "auto", record=record)
    group.rows = row_seeds(group.model)


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
        found = getattr(load_splits(_without_looking(config)), split)
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


def _without_looking(config: Config) -> Config:
    """The settings that give the same splits and look for near duplicates only where these are dropped."""
    if config.data.near_duplicates != "report":
        return config
    return config.model_copy(update={"data": config.data.model_copy(update={"near_duplicates": "off"})})


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
    templated = not isinstance(opened.task, Seq2Seq) and _of_run(folder, "data", "conversations")
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


def export(
    path: str | Path,
    *,
    merged: bool = False,
    target: str | Path | None = None,
    max_kl: float | None = None,
    overrides: tuple[str, ...] = (),
) -> tuple[Path, Drift]:
    """Verify a run's adapter in plain peft, or write the merged model and verify it in plain transformers.

    A merged model is also held against what was trained, on rows of the run's data: on a backbone that was rounded for
    training (`model.frozen_compute`) it is not the same, because the adapter goes onto the model's own weights.

    Args:
        merged: fold the adapter into the weights and write an ordinary model folder, with the figures in merge.json.
        target: where; `<run>/merged` by default. For adapters: a copy of the folder, or none.
        max_kl: bound of a merged model's mean KL(trained ‖ merged), nats per token, word or row; 0.05 by default.

    Returns:
        The folder, and how far the reloaded model's logits are from the trained one's.

    Raises:
        VerificationError: beyond a bound; no folder is left then.
    """
    found, _ = find_run(path, overrides)
    _check_max_kl(max_kl, merged)
    folder = Path(target).expanduser() if target else found / ("merged" if merged else "adapter")
    if (target or merged) and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} is not empty.", "Name another folder with --to, or delete it.")
    if merged:
        return folder, _export_whole(path, overrides, folder, max_kl)
    opened = open_run(path, (*overrides, *IN_FULL))
    drift = verify_adapter(opened.group, opened.config, opened.task, found / "adapter")
    if target:
        with storage_errors(folder):
            shutil.copytree(found / "adapter", folder, dirs_exist_ok=True)
    return folder, drift


def _export_whole(path: str | Path, overrides: tuple[str, ...], folder: Path, max_kl: float | None) -> Drift:
    """The merged model in `folder`, or nothing there: a model that fails its verification does not stay."""
    inside = folder.is_dir()  # an empty one, perhaps "." or a mount, which can't be replaced
    part = folder / ".part" if inside else folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        drift = _merge(path, overrides, part, folder, max_kl)
        apart, record = _hold_against_trained(path, overrides, part, drift, max_kl)
        apart.refuse()
        with storage_errors(folder):
            write_whole(part / MERGE, json.dumps(record, indent=2, allow_nan=False) + "\n")
            if inside:
                for one in part.iterdir():
                    os.replace(one, folder / one.name)
            else:
                os.replace(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return replace(drift, held_out=apart)


def _merge(path: str | Path, overrides: tuple[str, ...], part: Path, folder: Path, max_kl: float | None) -> Drift:
    """Write the merged model; the run that it was made of is let go on return."""
    opened = open_run(path, (*overrides, *IN_FULL))
    if max_kl is not None and item_kind(opened.task) == "values":
        raise ConfigError(
            "--max-kl: a model whose outputs are numbers has no probabilities to compare.", "Leave it out."
        )
    with storage_errors(folder):
        return export_merged(opened.group, opened.config, opened.task, opened.labels, part)


def _hold_against_trained(
    path: str | Path, overrides: tuple[str, ...], part: Path, drift: Drift, max_kl: float | None
) -> tuple[HeldOut, dict[str, Any]]:
    """The merged model in `part` against the run as it was trained; and what merge.json says."""
    opened = open_run(path, overrides)
    task, config, bound = opened.task, opened.config, MAX_KL if max_kl is None else max_kl
    try:
        split, data = _held_out_rows(config, task)
    except EngineError as error:
        note = f"the run's rows can't be read: {error.problem}"
        found = drift if opened.group.fused is None else compare_on_probe(opened.group, task, part)
        apart = held_out(found, task, "probe", 0, 0, bound, note=note)
    else:
        size = config.evaluation.batch_size or config.training.batch_size
        merged = task.plain(str(part)).to(opened.runtime.device).eval()
        with opened.group.evaluating(opened.group.members[0]) as model:
            apart = compare(model, merged, task, data, split, size, opened.runtime, bound)
    frozen = opened.group.fused.record if opened.group.fused else None
    record = {
        "schema": "peft-engine merge 1",
        "base": config.model.path,
        "frozen_compute": (frozen.format if frozen else None) or "full",
        "reloaded": {"relative": drift.relative, "kl": drift.kl, "top1_agreement": drift.top1_agreement},
        "held_out": apart.to_json(),
        "versions": versions(),
    }
    return apart, record


def _held_out_rows(config: Config, task: Task) -> tuple[str, EncodedSet]:
    """The test split, else that for evaluation, else the training rows. Raises EngineError where they can't be read."""
    splits = load_splits(_without_looking(config))
    name, split = next((name, one) for name in ("test", "eval", "train") if (one := getattr(splits, name)) is not None)
    limit, cache = config.data.max_dropped, cache_folder(config.data.cache)
    return name, encode_split(split, task.encode, task.fingerprint(), limit, cache)


def _check_max_kl(max_kl: float | None, merged: bool) -> None:
    if max_kl is None:
        return
    if not merged:
        raise ConfigError("--max-kl: only a merged model is compared so.", "Add --merged, or leave it out.")
    if not (math.isfinite(max_kl) and max_kl >= 0):
        raise ConfigError(f"--max-kl: got {max_kl}, expected a number of nats, 0 or more.", "Write it like 0.1.")


def _of_run(folder: Path, *names: str) -> Any:
    """What run.json says under these names. Raises StorageError where it says nothing."""
    path = folder / "run.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        for name in names:
            found = found[name]
        return found
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StorageError(
            f"{path} can't be read: {error}.", "Restore it, or run train --resume, which writes it anew."
        ) from error


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
