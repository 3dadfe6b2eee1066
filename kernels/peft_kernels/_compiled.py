"""The passes of cpu/passes.cpp, built once per machine by the C++ compiler that is found, called through ctypes.

The library lies in the user's cache folder under a name that holds the source, the compiler and this CPU's features.
Where there is no compiler, or it fails, everything runs in plain torch; `status()` says which, and why.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SOURCE = Path(__file__).parent / "cpu" / "passes.cpp"
SWITCH = "PEFT_KERNELS_COMPILE"
"""Environment variable; 0 leaves everything in plain torch."""
COMPILERS = ("c++", "g++", "clang++")
BASE = (
    "-O3",
    "-std=c++17",
    "-fPIC",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fvisibility=hidden",
)
# the first that the compiler takes; vectors of 512 bits are not compilers' own choice on machines that have them
TUNED = (
    ("-march=native", "-mprefer-vector-width=512", "-fopenmp"),
    ("-march=native", "-fopenmp"),
    ("-mcpu=native", "-fopenmp"),
    ("-march=native",),
    ("-mcpu=native",),
)
SECONDS = 120


@cache
def _load() -> tuple[Any, str]:
    """(the library, how it was built), or (None, why there is none)."""
    if os.environ.get(SWITCH) == "0":
        return None, f"{SWITCH}=0"
    installed = [path for path in map(shutil.which, COMPILERS) if path]
    found = os.environ.get("CXX", "").split() or installed[:1]
    if not found:
        return None, "no C++ compiler was found"
    try:
        version = _run([*found, "--version"]).splitlines()[0]
        sources = [path.read_text(encoding="utf-8") for path in sorted(SOURCE.parent.iterdir()) if path.is_file()]
        made_of = [*sources, version, *BASE, *sum(TUNED, ()), _cpu()]
        key = hashlib.sha256("\0".join(made_of).encode())
        path = _folder() / f"passes-{key.hexdigest()[:24]}.so"
        if not path.exists():
            _build(found, path)
        library = ctypes.CDLL(str(path))
        for name, kinds in _SIGNATURES.items():
            function = getattr(library, name)
            function.argtypes, function.restype = kinds, None
        _prove(library)
    except (OSError, subprocess.SubprocessError, AttributeError, RuntimeError, IndexError) as error:
        return None, f"the C++ compiler {found[0]} gave nothing usable: {str(error).splitlines()[0][:200]}"
    return library, f"compiled by {version}"


def _folder() -> Path:
    """Where the library is kept: the user's cache folder, or a temporary one where that can't be written."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    folder = Path(home) / "peft-kernels"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError:
        return Path(tempfile.mkdtemp(prefix="peft-kernels-"))


def _cpu() -> str:
    """What `-march=native` means here: a home folder may be shared between machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        flags = next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
    except OSError:
        flags = ""
    return " ".join((platform.system(), platform.machine(), platform.processor(), flags))


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    if done.returncode:
        raise RuntimeError(done.stderr.strip() or f"exit code {done.returncode}")
    return done.stdout


def _build(compiler: list[str], path: Path) -> None:
    """Compile, and link without an OpenMP runtime: torch's own is in the process, and a second one would fight it for
    the cores. The library appears whole or not at all."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        source, whole = str(Path(folder) / "passes.o"), str(Path(folder) / "passes.so")
        for place, flags in enumerate(TUNED):
            try:
                _run([*compiler, *BASE, *flags, "-c", str(SOURCE), "-o", source])
                break
            except RuntimeError:
                if place == len(TUNED) - 1:
                    raise
        undefined = ["-undefined", "dynamic_lookup"] if platform.system() == "Darwin" else []
        _run([*compiler, "-shared", *undefined, source, "-o", whole])
        os.replace(whole, path)


def status() -> str:
    """How the passes run on a CPU: "compiled by …", or "plain torch: …" and why."""
    library, told = _load()
    return told if library is not None else f"plain torch: {told}"


def there(t: Tensor) -> bool:
    """Whether the compiled passes run where this tensor lives."""
    return t.device.type == "cpu" and _load()[0] is not None


def usable(*tensors: Tensor | None) -> bool:
    """Whether the compiled passes take these tensors: plain fp32 on the CPU, their last dimension dense, not traced."""
    if torch.compiler.is_compiling():
        return False
    for t in tensors:
        if t is None:
            continue
        if type(t) not in (Tensor, torch.nn.Parameter) or t.dtype != torch.float32 or t.device.type != "cpu":
            return False
        if t.dim() and t.shape[-1] > 1 and t.stride(-1) != 1:
            return False
    return _load()[0] is not None


def call(name: str, *arguments: Any) -> None:
    """Run one function of the library; tensors are passed by their address, None as a null pointer."""
    library = _load()[0]
    given = [a.data_ptr() if isinstance(a, Tensor) else a for a in arguments]
    getattr(library, name)(*given, torch.get_num_threads())


def pitch(t: Tensor) -> int:
    """Elements from row to row of a matrix; a single row may claim anything."""
    return t.stride(0) if t.shape[0] > 1 else t.shape[-1]


_P, _N, _T, _F = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
_SIGNATURES: dict[str, list[Any]] = {
    "quantise": [_N, _P, _P, _P, _P, _N, _N, _P, _P, _T],
    "column_absmax": [_P, _N, _N, _N, _P, _T],
    "rescale": [_P, _N, _N, _N, _P, _P, _P, _P, _N, _T],
    "rescale_add": [_P, _N, _N, _N, _P, _P, _P, _N, _T],
    "softmax_block": [_P, _N, _N, _P, _P, _P, _P, _P, _P, _P, _P, _P, _P, _T],
    "swiglu": [_P, _N, _P, _N, _N, _N, _P, _T],
    "swiglu_back": [_P, _N, _P, _N, _P, _N, _N, _N, _P, _P, _T],
    "rms_norm": [_P, _N, _P, _N, _N, _F, _P, _P, _T],
    "rms_norm_back": [_P, _N, _P, _N, _P, _P, _N, _N, _P, _T],
    "zero_places": [_P, _N, _N, _N, _P, _T],
    "softmax_rows": [_P, _N, _N, _P, _T],
    "softmax_again": [_P, _N, _N, _P, _T],
    "softmax_back": [_P, _P, _P, _N, _N, _T],
    "drop_down": [_P, _N, _N, _N, _N, _P, _N, _P, _N, _N, _P, _N, _T],
    "draw_places": [_P, _N, _N, _N, _F, _P, _T],
    "dequantise_4bit": [_P, _P, _N, _P, _P, _P, _P, _P, _N, _N, _N, _P, _T],
    "dequantise_8bit": [_P, _P, _N, _N, _N, _P, _T],
    "few_rows_4bit": [_P, _P, _N, _P, _P, _P, _P, _P, _N, _P, _N, _N, _N, _N, _P, _P, _T],
    "few_rows_8bit": [_P, _P, _P, _N, _N, _N, _N, _P, _P, _T],
    "drop_back": [_P, _N, _N, _N, _N, _P, _N, _P, _N, _P, _N, _N, _P, _N, _P, _N, _T],
}


def _prove(library: Any) -> None:
    """One number through it: a library that was built but computes nonsense is not used."""
    products, scale, y = torch.tensor([[3]], dtype=torch.int32), torch.tensor([0.5]), torch.zeros(1, 1)
    library.rescale(
        products.data_ptr(), 1, 1, 1, scale.data_ptr(), None, None, y.data_ptr(), 1, torch.get_num_threads()
    )
    if float(y) != 1.5:
        raise RuntimeError("it does not compute what it should")
