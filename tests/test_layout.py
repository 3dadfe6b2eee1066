"""The house rules that a reader relies on: where things stand, what imports what, what never gets in."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# One arrow: a file imports only from what stands above it. The same order stands in the README's tree.
ORDER = (
    "errors",
    "config_methods",
    "config_options",
    "config_preference",
    "config_frozen",
    "config_quantised",
    "config_memory",
    "config_faults",
    "config_data_checks",
    "config_checks",
    "answers",
    "config_model",
    "config",
    "config_names",
    "config_yaml",
    "config_messages",
    "config_writing",
    "config_reading",
    "processes",
    "runtime",
    "meters",
    "vocabulary",
    "int8_linear",
    "stored_checkpoint",
    "quantised",
    "backbone",
    "data",
    "levers",
    "adapters",
    "generation",
    "tasks",
    "training",
    "evaluation",
    "drift",
    "model_card",
    "exporting",
    "gguf_files",
    "run_directory",
    "tracking",
    "building",
    "session",
    "reference",
    "preference_run",
    "run",
    "opening",
    "export_run",
    "using",
    "merging",
    "doctor",
    "inspection",
    "printing",
    "cli_tools",
    "faults",
    "launching",
    "starting",
    "bench",
    "cli_bench",
    "cli_report",
    "cli",
    "__main__",
)
MAX_LINES = 420


def repo_files() -> list[Path]:
    """Files that are committed or would be, relative to the root."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    return sorted(Path(name) for name in listed if (ROOT / name).is_file())


FILES = repo_files()
PYTHON = [path for path in FILES if path.suffix == ".py"]
SHIPPED = [path for path in PYTHON if path.parts[0] != "tests"]
ENGINE = [path for path in PYTHON if path.parts[0] == "peft_engine"]


def module_of(path: Path) -> str:
    """peft_engine/data/__init__.py → peft_engine.data"""
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in ENGINE}


def imports_of(path: Path) -> set[str]:
    """Dotted names that a file imports, lazily inside functions too; `from a import b` gives a.b."""
    names: set[str] = set()
    package = path.parent.parts
    for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join([*above, *([node.module] if node.module else [])])
            names |= {f"{base}.{alias.name}" for alias in node.names}
    return names


def engine_imports(path: Path) -> set[str]:
    """Modules of peft_engine that `path` imports: the longest prefix of each imported name that is a module."""
    found = set()
    for name in imports_of(path):
        while name and name not in MODULES:
            name = name.rpartition(".")[0]
        if name:
            found.add(name)
    return found - {module_of(path)}


def place(module: str) -> int:
    """Where a module stands in ORDER, by its top-level part; only cli stands below the package itself, its face."""
    part = module.split(".")[1] if "." in module else "cli"
    assert part in ORDER, f"{part} has no place in ORDER"
    return ORDER.index(part)


def test_every_module_has_its_place_in_the_order():
    unplaced = {module.split(".")[1] for module in MODULES if module != "peft_engine"} - set(ORDER)
    assert not unplaced, f"add {sorted(unplaced)} to ORDER, where its imports allow"


def test_imports_point_one_way():
    wrong = [
        f"{path} imports {module}"
        for path in ENGINE
        if module_of(path) != "peft_engine"
        for module in sorted(engine_imports(path))
        if place(module) > place(module_of(path))
    ]
    assert not wrong, "\n".join(wrong)


def test_no_circles_inside_a_package():
    """A package's `__init__` may import its files; no file may lead back to itself, nor to its package's `__init__`."""
    edges = {module: engine_imports(path) for module, path in MODULES.items() if module != "peft_engine"}
    for start in edges:
        seen: set[str] = set()
        ahead = list(edges[start])
        while ahead:
            module = ahead.pop()
            assert module != start, f"{start} is imported by something that it imports"
            if module not in seen:
                seen.add(module)
                ahead += edges.get(module, ())


def test_peft_kernels_imports_torch_and_triton_only():
    allowed = {"torch", "triton", "peft_kernels"} | sys.stdlib_module_names
    kernels = [path for path in PYTHON if path.parts[:2] == ("kernels", "peft_kernels")]
    assert kernels
    for path in kernels:
        roots = {name.removeprefix("kernels.").split(".")[0] for name in imports_of(path)}
        assert roots <= allowed, f"{path} imports {sorted(roots - allowed)}"
        assert "triton" not in roots or "gpu" in path.parts, f"{path} must import without triton: move it under gpu/"


def test_the_source_root_kernels_is_no_package():
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_huggingface_kernels_is_found_from_the_repo_root(tmp_path):
    stand_in = tmp_path / "kernels"
    stand_in.mkdir()
    (stand_in / "__init__.py").write_text("WHO = 'stand-in'\n")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    done = subprocess.run(
        [sys.executable, "-c", "import kernels; print(kernels.WHO)"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (0, "stand-in\n"), done.stderr


@pytest.mark.parametrize(
    ("module", "kept"),
    [("pass", False), ("__file__ = 'kernels/__init__.py'", True), (None, True)],
    ids=["folder", "package", "none"],
)
def test_a_folder_is_not_called_an_old_package(module, kept):
    """bitsandbytes takes our source root for Hugging Face's `kernels` and warns of it; of a real one it may."""
    put = f"import types; sys.modules['kernels'] = m = types.ModuleType('kernels'); exec({module!r}, m.__dict__)"
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            f"import logging, sys, peft_engine\n{put if module else ''}\n"
            "logging.getLogger('bitsandbytes.backends.cpu.ops').warning('Failed to load: %s. Install it',"
            "ImportError(\"cannot import name 'get_kernel' from 'kernels' (unknown location)\"))",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, "Failed to load" in done.stderr) == (0, kept), done.stderr


def test_no_module_takes_the_name_of_an_exported_function():
    import peft_engine

    modules = {module.split(".")[1] for module in MODULES if module != "peft_engine"}
    clash = modules & set(peft_engine.__all__)
    assert not clash, f"`from peft_engine import {min(clash)}` would give the module or the function, by chance"


def test_what_is_exported_is_there():
    import peft_engine

    assert [name for name in peft_engine.__all__ if not hasattr(peft_engine, name)] == []


def test_files_hold_one_idea():
    lengths = {str(path): len((ROOT / path).read_text(encoding="utf-8").splitlines()) for path in SHIPPED}
    assert {name: lines for name, lines in lengths.items() if lines > MAX_LINES} == {}


def unpickling(source: str) -> list[str]:
    """Imports and calls that can run code from a file."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = node.module if isinstance(node, ast.ImportFrom) else None
            names = {(module or alias.name).split(".")[0] for alias in node.names}
            found += sorted(names & {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"})
        elif isinstance(node, ast.Call):
            keywords = {k.arg: k.value.value for k in node.keywords if isinstance(k.value, ast.Constant)}
            called = ast.unparse(node.func)
            if called in {"torch.save", "pd.read_pickle", "pandas.read_pickle"} or keywords.get("allow_pickle"):
                found.append(called)
            if called == "torch.load" and keywords.get("weights_only") is not True:
                found.append(called)
    return found


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from joblib import load",
        "torch.load(f)",
        "torch.load(f, weights_only=False)",
        "np.load(f, allow_pickle=True)",
        "torch.save(x, f)",
    ],
)
def test_unpickling_is_seen(source):
    assert unpickling(source)


def test_nothing_unpickles():
    assert not unpickling("torch.load(f, weights_only=True)\nimport json\n")
    seen = {str(path): unpickling((ROOT / path).read_text(encoding="utf-8")) for path in SHIPPED}
    assert {name: what for name, what in seen.items() if what} == {}


# Spelt in pieces, so that this file does not match itself
FOREIGN = re.compile(
    "|".join(
        [
            r"pypi" + r"\.(org|python)",
            r"pythonhosted" + r"\.org",
            r"download" + r"\.pytorch\.org",
            r"registry" + r"\.npmjs",
            r"find" + r"-links",
            r"(extra-)?index" + r"-url",
            r"(?<![\w.$}/-])/(work|opt|root|Users|home|mnt)" + r"/\w",
        ]
    )
)


def test_no_registry_host_and_no_path_of_a_machine():
    found = []
    for path in FILES:
        try:
            text = (ROOT / path).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        lines = text.splitlines()
        found += [f"{path}:{i}: {line.strip()[:100]}" for i, line in enumerate(lines, 1) if FOREIGN.search(line)]
    assert not found, "\n".join(found)


def test_foreign_names_are_seen():
    assert FOREIGN.search("see https://" + "pypi" + ".org/simple")
    assert FOREIGN.search('open("/' + 'work/main/x")')
    assert not FOREIGN.search("homework/runs and adapters/opt/x and $HOME/" + "work/x")


def read_tree(readme: str) -> dict[str, bool]:
    """The first fenced block of the README that shows `peft_engine/`: path → is it a folder, in order of appearance.

    One entry per line: name, two or more blanks, what it is. Depth is the column of the name; box-drawing is fine.
    """
    blocks = re.findall(r"^```[^\n]*\n(.*?)^```", readme, flags=re.MULTILINE | re.DOTALL)
    block = next((b for b in blocks if re.search(r"^[ │├└─]*peft_engine/", b, flags=re.MULTILINE)), "")
    entries: dict[str, bool] = {}
    above: list[tuple[int, str]] = []
    for line in block.splitlines():
        plain = re.sub("[│├└─]", " ", line)
        if not plain.strip():
            continue
        column = len(plain) - len(plain.lstrip())
        name = re.split(r"\s{2,}|\s+#", plain.strip())[0]
        while above and above[-1][0] >= column:
            above.pop()
        path = (above[-1][1] if above else "") + name
        entries[path.rstrip("/")] = name.endswith("/")
        if name.endswith("/"):
            above.append((column, path))
    return entries


@pytest.fixture(scope="module")
def tree() -> dict[str, bool]:
    readme = ROOT / "README.md"
    assert readme.is_file(), "README.md is missing"
    entries = read_tree(readme.read_text(encoding="utf-8"))
    assert entries, "README.md has no fenced tree that shows peft_engine/"
    return entries


def test_tree_is_read():
    block = (
        "```\nMakefile      targets\na.b/c/\n  x.py        one  idea\n  deep/       folder\n    y.py\nz.py  last\n```\n"
    )
    assert read_tree(block) == {}
    assert read_tree(block.replace("a.b/c/", "peft_engine/")) == {
        "Makefile": False,
        "peft_engine": True,
        "peft_engine/x.py": False,
        "peft_engine/deep": True,
        "peft_engine/deep/y.py": False,
        "z.py": False,
    }


def test_what_the_tree_names_exists(tree):
    wrong = [
        path for path, folder in tree.items() if not ((ROOT / path).is_dir() if folder else (ROOT / path).is_file())
    ]
    assert not wrong, f"README's tree names what is not there: {wrong}"


def test_every_file_is_in_the_tree(tree):
    """By its own line, or by that of a folder listed as a whole. Dot files and __init__ go without."""
    opened = {str(Path(path).parent) for path in tree}
    whole = [path for path, folder in tree.items() if folder and path not in opened]
    missing = [
        str(path)
        for path in FILES
        if str(path) not in tree
        and not path.parts[0].startswith(".")
        and path.name != "__init__.py"
        and not any(path.is_relative_to(folder) for folder in whole)
    ]
    assert not missing, f"README's tree lacks: {missing}"


def test_the_engine_is_held_file_by_file(tree):
    assert [str(path) for path in ENGINE if path.name != "__init__.py" and str(path) not in tree] == []


def test_imports_point_up_the_tree(tree):
    """The README's order is the real one, file by file."""
    line = {path: number for number, path in enumerate(tree)}
    wrong = [
        f"{path} imports {module}, which stands below it in README's tree"
        for path in ENGINE
        if path.name != "__init__.py"
        for module in sorted(engine_imports(path))
        if MODULES[module].name != "__init__.py" and line[str(MODULES[module])] > line[str(path)]
    ]
    assert not wrong, "\n".join(wrong)
