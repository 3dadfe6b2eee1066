"""peft-engine: parameter-efficient fine-tuning that is fast, says what it costs, and never fails silently."""

import logging
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .adapters.fusing import FuseReport, fuse, unfuse
    from .config import Config
    from .config_reading import load_config
    from .errors import EngineError
    from .run import train
    from .using import evaluate, export, generate, predict

__all__ = [
    "Config",
    "EngineError",
    "FuseReport",
    "evaluate",
    "export",
    "fuse",
    "generate",
    "load_config",
    "predict",
    "train",
    "unfuse",
]

_HOME = {
    "Config": "config",
    "EngineError": "errors",
    "FuseReport": "adapters.fusing",
    "fuse": "adapters.fusing",
    "unfuse": "adapters.fusing",
    "load_config": "config_reading",
    "train": "run",
    "evaluate": "using",
    "export": "using",
    "generate": "using",
    "predict": "using",
}


def _is_true(record: logging.LogRecord) -> bool:
    """Whether bitsandbytes is right about the package `kernels`: in the root of this repository it takes a folder of
    that name for one, and warns that it is too old.
    """
    found = sys.modules.get("kernels")
    folder_only = found is not None and getattr(found, "__file__", None) is None
    return not (folder_only and "cannot import name" in record.getMessage() and "'kernels'" in record.getMessage())


logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(_is_true)


def __getattr__(name: str) -> Any:
    """Import on first use: `import peft_engine` must not wait for torch."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)
