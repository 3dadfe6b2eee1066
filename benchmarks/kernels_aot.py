"""Compile every Triton kernel ahead of time, for cards that are not here, and read what the compiler made of it.

    python benchmarks/kernels_aot.py [--kernel NAME] [--arch sm_80] [--json FILE]

Each `peft_kernels/gpu/*.py` ends in `CASES`: one entry per kernel and configuration of its static table. Each is
compiled for Ampere (sm_80), Hopper (sm_90) and Turing (sm_75), or for the cards that it names (fp8 begins with Ada,
sm_89), two at a time, and what came out is read: registers and stack from the binary, the instruction mix from its PTX.
A case fails that keeps registers in memory (stack or local bytes), wants more shared memory than a block may have
there, lacks the tensor-core instructions it promises or one that it demands by name, or holds an atomic operation
(gradients would change from run to run). A kernel that no case names fails as well. The exit status is 1 if anything
failed.

Triton builds no tensor-core instructions for Turing (tested with 3.7.1: `tl.dot` becomes scalar products). So a kernel
that promises them is not compiled for sm_75, its row says so, and there the op has to go through cuBLAS. The others are
held to the same rules on sm_75; where Triton or its assembler refuses one, its row gives the reason.

The first run takes minutes; Triton's cache makes the next one fast. `--kernel` and `--arch` narrow it.
"""

import argparse
import ast
import importlib
import inspect
import json
import multiprocessing
import os
import pkgutil
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, field
from io import StringIO
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import ModuleType
from typing import Any

# Triton flips this default in 3.10: a number measured today must mean the same tomorrow.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

# bytes that one block may have
SHARED_LIMIT = {"sm_75": 64 << 10, "sm_80": 163 << 10, "sm_89": 99 << 10, "sm_90": 227 << 10}
ARCHS = tuple(SHARED_LIMIT)
WORKERS = 2
CASE_SECONDS = 180
TENSOR = re.compile(r"(mma|wgmma\.mma_async)\.")
PTX = re.compile(r"^\s*(?:@!?%\w+\s+)?([a-z]\w*(?:[.:]+\w+)+)", re.MULTILINE)
# Column of the table → the PTX instructions it counts.
MIX = {
    "tensor": TENSOR,
    "ld128": re.compile(r"ld\.global\..*(v4\.\w32|v2\.\w64)"),
    "ld": re.compile(r"ld\.global\."),
    "st128": re.compile(r"st\.global\..*(v4\.\w32|v2\.\w64)"),
    "st": re.compile(r"st\.global\."),
    "async": re.compile(r"cp\.async\.(c[ag]|bulk)\."),
    "fma": re.compile(r"(fma|mul|add|sub)\.(\w+\.)*f32"),
    "special": re.compile(r"(ex2|lg2|rcp|rsqrt|sqrt|tanh|sin|cos|div)\."),
    "atomic": re.compile(r"(atom|red)\."),
}


@dataclass(kw_only=True)
class Row:
    """What one case became on one architecture."""

    kernel: str
    case: str
    arch: str
    verdict: str = "ok"
    failed: bool = False
    registers: int = 0
    spill_bytes: int = 0
    shared_bytes: int = 0
    tensor_cores: str = ""
    mix: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0


def gpu_modules() -> list[ModuleType]:
    import peft_kernels.gpu

    names = sorted(found.name for found in pkgutil.iter_modules(peft_kernels.gpu.__path__))
    return [importlib.import_module(f"peft_kernels.gpu.{name}") for name in names]


def jit_function(kernel: Any) -> Any:
    """The function itself, from under an autotuner or a heuristic."""
    from triton.runtime.jit import JITFunction

    while not isinstance(kernel, JITFunction):
        kernel = kernel.fn
    return kernel


def name_of(case: Any) -> str:
    """File and function, such as glu._glu_forward_kernel."""
    function = jit_function(case.kernel)
    return f"{function.__module__.rpartition('.')[2]}.{function.__name__}"


def kernels_in(module: ModuleType) -> set[str]:
    """The module's own `@triton.jit` functions that run as kernels: called `…_kernel`, or launched by name[grid]."""
    tree = ast.parse(inspect.getsource(module))
    jitted = {
        node.name
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and any("jit" in ast.unparse(mark) for mark in node.decorator_list)
    }
    launched = {
        node.func.value.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript) and isinstance(node.func.value, ast.Name)
    }
    return {name for name in jitted if name.endswith("_kernel") or name in launched}


def uncovered(modules: Sequence[ModuleType]) -> list[str]:
    """Kernels that no case compiles, whichever file it stands in."""
    functions = [jit_function(case.kernel) for module in modules for case in getattr(module, "CASES", ())]
    covered = {f"{function.__module__}.{function.__name__}" for function in functions}
    kernels = {f"{module.__name__}.{name}" for module in modules for name in kernels_in(module)}
    return sorted(kernels - covered)


def check_case(case: Any) -> None:
    """A case that doesn't say what its kernel takes would compile something that never runs."""
    expected, got = set(jit_function(case.kernel).arg_names), set(case.signature) | set(case.constants)
    if expected != got or set(case.signature) & set(case.constants):
        raise ValueError(
            f"signature and constants must name each argument once: missing {sorted(expected - got)}, "
            f"unknown {sorted(got - expected)}, twice {sorted(set(case.signature) & set(case.constants))}"
        )
    if stray := set(case.aligned) - set(case.signature):
        raise ValueError(f"aligned names {sorted(stray)}, which the signature doesn't")


def resources(cubin: bytes) -> dict[str, int]:
    """REG, STACK, LOCAL … as the assembler left them in the binary."""
    from triton import knobs

    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch, "kernel.cubin")
        path.write_bytes(cubin)
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", str(path)]
        told = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    numbers = {name: int(value) for name, value in re.findall(r"\b([A-Z]+):(\d+)", told)}
    if not {"REG", "STACK", "LOCAL"} <= numbers.keys():
        raise RuntimeError(f"{command[0]} told nothing about the kernel: {told!r}")
    return numbers


def judge(row: Row, *, promised: bool, demand: str = "", instructions: Iterable[str] = ()) -> None:
    """Set the verdict from the row's numbers; `demand`: a pattern that one of the instructions must match."""
    faults = []
    if row.spill_bytes:
        faults.append(f"spills {row.spill_bytes} bytes")
    if row.shared_bytes > (limit := SHARED_LIMIT[row.arch]):
        faults.append(f"shared memory {row.shared_bytes} > {limit}")
    if promised and not row.mix["tensor"]:
        faults.append("no tensor-core instructions")
    if demand and not any(re.match(demand, op) for op in instructions):
        faults.append(f"no instruction {demand}")
    if row.mix["atomic"]:
        faults.append("atomic operations")
    if faults:
        row.verdict, row.failed = "FAIL: " + ", ".join(faults), True


def compile_case(case: Any, arch: str) -> Row:
    """Compile, take apart, judge. Never raises: a refusal is a verdict."""
    from triton import compile as compile_triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = jit_function(case.kernel)
    row = Row(kernel=name_of(case), case=case.label, arch=arch)
    start = time.perf_counter()
    try:
        check_case(case)
        if case.tensor_cores and arch == "sm_75":
            row.verdict = "not for sm_75: Triton uses no tensor cores there"
            return row
        signature = {
            name: "constexpr" if name in case.constants else case.signature[name] for name in function.arg_names
        }
        aligned = {(function.arg_names.index(name),): [["tt.divisibility", 16]] for name in case.aligned}
        source = ASTSource(function, signature, dict(case.constants), aligned)
        target = GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
        options: dict[str, Any] = {"num_warps": case.num_warps, "num_stages": case.num_stages}
        if not case.fp_fusion:
            options["enable_fp_fusion"] = False
        with redirect_stdout(StringIO()):  # a refusal prints the whole program
            made = compile_triton(source, target=target, options=options)
        numbers, instructions = resources(made.asm["cubin"]), Counter(PTX.findall(made.asm["ptx"]))
        row.registers, row.spill_bytes = numbers["REG"], numbers["STACK"] + numbers["LOCAL"]
        row.shared_bytes = made.metadata.shared
        row.mix = {name: sum(n for op, n in instructions.items() if pattern.match(op)) for name, pattern in MIX.items()}
        row.tensor_cores = " ".join(sorted({op.split(".")[0] for op in instructions if TENSOR.match(op)}))
        judge(row, promised=case.tensor_cores, demand=case.demands.get(arch, ""), instructions=instructions)
    except Exception as error:
        reason = re.sub(r"\s+", " ", f"{type(error).__name__}: {error}").strip()
        # Turing is a bonus: where Triton refuses it, the table says so and why.
        refused = arch == "sm_75" and not isinstance(error, ValueError)
        row.verdict, row.failed = f"{'refused' if refused else 'FAIL'}: {reason[:300]}", not refused
    row.seconds = round(time.perf_counter() - start, 2)
    return row


def _child(case: Any, arch: str, results: Connection) -> None:
    results.send(compile_case(case, arch))


def _child_in_its_group(case: Any, arch: str, results: Connection) -> None:
    os.setpgrp()  # so that the assembler it starts ends with it
    _child(case, arch, results)


def compile_all(jobs: Sequence[tuple[Any, str]], workers: int = WORKERS) -> Iterator[Row]:
    """Each job in a forked process of its own, some at a time: LLVM may end its process, and must not end ours."""
    fork = multiprocessing.get_context("fork")
    waiting, running = list(reversed(jobs)), {}
    while waiting or running:
        while waiting and len(running) < workers:
            case, arch = waiting.pop()
            ours, theirs = fork.Pipe(duplex=False)
            process = fork.Process(target=_child_in_its_group, args=(case, arch, theirs))
            process.start()
            theirs.close()
            running[ours] = (process, case, arch, time.monotonic())
        for ready in wait(list(running), timeout=1):
            process, case, arch, _ = running.pop(ready)
            try:
                yield ready.recv()
            except EOFError:
                process.join()
                yield _lost(case, arch, f"the compiler ended its process with status {process.exitcode}")
            process.join()
            ready.close()
        for pipe, (process, case, arch, start) in list(running.items()):
            if time.monotonic() - start > CASE_SECONDS:
                running.pop(pipe)
                os.killpg(process.pid, signal.SIGKILL)
                process.join()
                yield _lost(case, arch, f"no result after {CASE_SECONDS} s")


def _lost(case: Any, arch: str, why: str) -> Row:
    refused = arch == "sm_75"
    verdict = f"{'refused' if refused else 'FAIL'}: {why}"
    return Row(kernel=name_of(case), case=case.label, arch=arch, verdict=verdict, failed=not refused)


def table(rows: Sequence[Row]) -> str:
    """The rows as aligned text; a case that never came to numbers shows its verdict alone."""
    head = ["kernel", "case", "arch", "regs", "spill", "shared", "tensor", "ld128/ld", "st128/st", "async", "fma"]
    lines = [[*head, "special", "verdict"]]
    for row in rows:
        mix = row.mix
        tensor = f"{mix['tensor']} {row.tensor_cores}".strip() if mix else ""
        numbers = (
            [str(row.registers), str(row.spill_bytes), str(row.shared_bytes), tensor]
            + [f"{mix['ld128']}/{mix['ld']}", f"{mix['st128']}/{mix['st']}"]
            + [str(mix[name]) for name in ("async", "fma", "special")]
            if mix
            else [""] * 9
        )
        lines.append([row.kernel, row.case, row.arch, *numbers, row.verdict])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]) - 1)]
    return "\n".join(
        "  ".join([*(cell.ljust(width) for cell, width in zip(line, widths, strict=False)), line[-1]]) for line in lines
    )


def jobs_of(modules: Sequence[ModuleType], archs: Sequence[str], kernel: str) -> list[tuple[Any, str]]:
    """Each case once on every card that it is for, though a file passes on the cases of another."""
    cases = {id(case): case for module in modules for case in getattr(module, "CASES", ())}
    return [(case, arch) for case in cases.values() for arch in archs if arch in case.archs and kernel in name_of(case)]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kernel", default="", metavar="NAME", help="only kernels whose module.name holds NAME")
    parser.add_argument("--arch", action="append", choices=ARCHS, help="only this one; may be given more than once")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers there as well")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None, modules: Sequence[ModuleType] | None = None) -> int:
    options = parse(arguments)
    if os.environ.get("TRITON_INTERPRET"):
        print("TRITON_INTERPRET is set: kernels would be interpreted, not compiled. Unset it.", file=sys.stderr)
        return 2
    import triton

    modules = gpu_modules() if modules is None else modules
    jobs = jobs_of(modules, options.arch or ARCHS, options.kernel)
    if not jobs:
        print(f"no case of any kernel matches {options.kernel!r}", file=sys.stderr)
        return 2
    print(
        f"{len(jobs)} compilations, Triton {triton.__version__}, "
        f"TRITON_DEFAULT_FP_FUSION={os.environ['TRITON_DEFAULT_FP_FUSION']}, shared limits {SHARED_LIMIT}",
        flush=True,
    )
    start = time.perf_counter()
    places = {(name_of(case), case.label, arch): place for place, (case, arch) in enumerate(jobs)}
    rows = []
    for row in compile_all(jobs):
        rows.append(row)
        if row.failed or len(rows) % 50 == 0:
            print(
                f"{len(rows)} of {len(jobs)}: {row.kernel} {row.case} {row.arch} {row.verdict}",
                file=sys.stderr,
                flush=True,
            )
    rows.sort(key=lambda row: places[row.kernel, row.case, row.arch])
    missing = [] if options.kernel else uncovered(modules)
    print(table(rows))
    bad = [row for row in rows if row.failed]
    for name in missing:
        print(f"FAIL: {name} is in no CASES")
    if options.json:
        record = {
            "triton": triton.__version__,
            "fp_fusion": os.environ["TRITON_DEFAULT_FP_FUSION"],
            "shared_limit": SHARED_LIMIT,
            "uncovered": missing,
            "rows": [asdict(row) for row in rows],
        }
        options.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(
        f"{len(rows)} rows in {time.perf_counter() - start:.0f} s: {len(rows) - len(bad)} as promised or set "
        f"aside, {len(bad)} failed, {len(missing)} kernels without a case"
    )
    return 1 if bad or missing else 0


if __name__ == "__main__":
    sys.exit(main())
