"""What every test shares. Set before torch is imported, and inherited by the processes that tests start."""

import os
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
for _variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_variable, "1")

ROOT = Path(__file__).resolve().parents[1]
NEEDED = (
    "models/minilm/model.safetensors",
    "models/bert-tiny/model.safetensors",
    "models/smollm2/model.safetensors",
    "data/sarcasm.jsonl",
    "data/past_tense.jsonl",
    "data/e2e_nlg.jsonl",
)


@pytest.fixture(scope="session")
def assets() -> Path:
    """The folder of real models and data. Missing ones fail the test: a skip would hide that nothing was tested."""
    folder = ROOT / ".assets"
    missing = [name for name in NEEDED if not (folder / name).is_file()]
    if missing:
        pytest.fail(f"{', '.join(missing)} not in .assets: run `make assets`.", pytrace=False)
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """family → folder of a tiny random model (see tiny.py), made once. Don't write into it."""
    from tiny import make_model

    return cache(lambda family: make_model(family, tmp_path_factory.mktemp("models") / family))
