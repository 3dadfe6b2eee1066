"""What a suite asks for and the bench can't do: said before anything is trained, all of it at once.

What only the rows tell, such as their columns, the baseline cell finds; without it nothing else is started (`running`).
"""

from collections.abc import Iterator
from pathlib import Path

from ..config_checks import PREFERENCE, TEXT
from ..config_faults import lookup
from ..config_reading import load_config
from ..data.reading import local_path
from ..errors import ConfigError, EngineError
from .cells import method_faults, settings_of
from .general_text import texts_of, too_short, windows
from .published import figures_of, read_publication
from .suite import GeneralText, Suite

JUDGED = (*TEXT, "image-classification")
"""Tasks whose test rows are judged one by one."""
MADE_IN = Path(".assets/data")
PREPARED = {
    "gsm8k": ("metamathqa.jsonl", "gsm8k-valid.jsonl", "gsm8k-test.jsonl"),
    "alpaca2k": ("alpaca2k.jsonl",),
    "text8 --source text8": ("text8-train.jsonl", "text8-valid.jsonl", "text8-test.jsonl"),
}
"""What benchmarks/published/prepare.py is told → the files that it then makes."""
DOUBT = 16  # bytes of text per wanted token that are surely enough


def check_suite(suite: Suite) -> None:
    """Raises ConfigError with all faults."""
    faults = [*method_faults(suite), *_task(suite), *_unprepared(suite), *_splits(suite), *_answers(suite)]
    faults += [*_general_text(suite), *_published(suite)]
    if faults:
        raise ConfigError("\n".join(faults))


def _task(suite: Suite) -> Iterator[str]:
    task = suite.config.get("task")
    if task in PREFERENCE:
        text = f"config.task: got {task}, expected one of {', '.join(JUDGED)}"
        yield f"{text}: methods are compared on single test rows, and {task} judges none"


def _unprepared(suite: Suite) -> Iterator[str]:
    """Data of published figures that a script makes: what near names there are in its folder helps nobody."""
    given = [lookup(suite.config, f"data.{name}") for name in ("train", "eval", "test")]
    missing = [Path(path) for path in given if isinstance(path, str) and not Path(path).exists()]
    for words, files in PREPARED.items():
        lacking = [str(path) for path in missing if path.parent == MADE_IN and path.name in files]
        if lacking:
            text = f"config.data: there is no {', '.join(lacking)}"
            yield f"{text}; `python benchmarks/published/prepare.py {words}` makes what this suite needs"


def _splits(suite: Suite) -> Iterator[str]:
    for name, why in (("eval", "learning rates are chosen"), ("test", "methods are compared")):
        if lookup(suite.config, f"data.{name}") is None and lookup(suite.config, f"data.split.{name}") == 0:
            text = f"config.data.split.{name}: got 0, and config.data.{name} is not given; {why} on that split"
            yield f"{text}; write a share such as 0.1, or give config.data.{name}"


def _answers(suite: Suite) -> Iterator[str]:
    columns = lookup(suite.config, "data.columns")
    asked = lookup(suite.config, "evaluation.generate_rows")
    if asked and isinstance(columns, dict) and "text" in columns and suite.config.get("task") == "causal-lm":
        text = f"config.evaluation.generate_rows: got {asked}, and the rows are plain text (config.data.columns.text)"
        yield f"{text}, without answers to compare with; set it to 0, or name the columns prompt and completion"


def _general_text(suite: Suite) -> Iterator[str]:
    """Of a hub data set only the baseline cell knows more."""
    text = suite.general_text
    if text is None or local_path(text.path) is None:
        return
    try:
        found = sum(len(part.encode()) + 1 for part in texts_of(text))
        wanted = text.rows * text.max_length
        if found < wanted:  # a token is a byte or more
            raise too_short(text, f"{found:,} bytes")
        if found < DOUBT * wanted:
            _count_tokens(suite, text)
    except EngineError as error:
        said = str(error)
        yield said if said.startswith("general_text: ") else f"general_text: {said}"


def _count_tokens(suite: Suite, text: GeneralText) -> None:
    """Raises DataError where a tokenizer that is at hand makes too few tokens of the text."""
    try:
        settings = settings_of(suite, "final", "baseline", suite.seeds[0], None)
        model = load_config({**settings, "output": "unset"}).model
        if not Path(model.path).expanduser().exists():
            return
        from ..backbone import load_tokenizer  # torch is slow to import

        tokenizer = load_tokenizer(model)
    except EngineError:
        return  # told with the methods' faults, or by the baseline cell
    windows(text, tokenizer)


def _published(suite: Suite) -> Iterator[str]:
    if suite.published:
        try:
            figures_of(read_publication(Path(suite.published.path)), suite.published)
        except ConfigError as error:
            said = str(error)
            yield said if said.startswith("published") else f"published: {said}"
