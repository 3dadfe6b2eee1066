"""`make kernels-aot` fails where it must: kernels made to break each rule, compiled as the real ones are."""

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import triton
import triton.language as tl

import kernels_aot
from peft_kernels.gpu._cases import Case

ROOT = Path(__file__).resolve().parents[1]


@triton.jit
def _double_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs, mask=offs < n, other=0.0).to(tl.float32)
    tl.store(y_ptr + offs, x * 2, mask=offs < n)


@triton.jit
def _add_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.atomic_add(y_ptr + offs, tl.load(x_ptr + offs, mask=offs < n), mask=offs < n)


@triton.jit
def _multiply_and_add_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs, mask=offs < n, other=0.0).to(tl.float32)
    tl.store(y_ptr + offs, x * 3 + 5, mask=offs < n)


@triton.jit
def _matmul_kernel(a_ptr, b_ptr, c_ptr, K, SIZE: tl.constexpr, DEPTH: tl.constexpr):
    i, j = tl.arange(0, SIZE), tl.arange(0, DEPTH)
    acc = tl.zeros((SIZE, SIZE), dtype=tl.float32)
    for k in range(0, K, DEPTH):
        a = tl.load(a_ptr + i[:, None] * K + k + j[None, :])
        b = tl.load(b_ptr + i[None, :] * K + k + j[:, None])
        acc = tl.dot(a, b, acc)
    tl.store(c_ptr + i[:, None] * SIZE + i[None, :], acc)


@triton.jit
def _helper(x):
    return x * 2


@triton.jit
def launched_under_another_name(x_ptr):
    tl.store(x_ptr, _helper(tl.load(x_ptr)))


def launch(x) -> None:
    launched_under_another_name[(1,)](x)


def double(**changes) -> Case:
    settings = {
        "kernel": _double_kernel,
        "label": "bf16",
        "signature": {"x_ptr": "*bf16", "y_ptr": "*bf16", "n": "i32"},
        "constants": {"BLOCK": 1024},
        "aligned": ("x_ptr", "y_ptr", "n"),
    }
    return Case(**settings | changes)


def matmul(dtype: str = "*bf16", size: int = 64, depth: int = 32, **changes) -> Case:
    return Case(
        kernel=_matmul_kernel,
        label=f"{dtype} {size}x{depth}",
        signature={"a_ptr": dtype, "b_ptr": dtype, "c_ptr": "*fp32", "K": "i32"},
        constants={"SIZE": size, "DEPTH": depth},
        aligned=("a_ptr", "b_ptr", "c_ptr", "K"),
        **{"tensor_cores": True, **changes},
    )


@pytest.mark.parametrize("arch", kernels_aot.ARCHS)
def test_a_good_elementwise_kernel_passes_with_wide_loads(arch):
    row = kernels_aot.compile_case(double(), arch)
    assert (row.verdict, row.failed, row.spill_bytes) == ("ok", False, 0)
    assert row.registers > 8
    assert row.mix["ld128"] == row.mix["ld"] > 0
    assert row.mix["st128"] == row.mix["st"] > 0


def test_alignment_reaches_the_compiler():
    row = kernels_aot.compile_case(double(aligned=()), "sm_80")
    assert row.mix["ld128"] == 0 < row.mix["ld"]


@pytest.mark.parametrize(("arch", "unit"), [("sm_80", "mma"), ("sm_90", "wgmma")])
def test_tensor_cores_are_found(arch, unit):
    row = kernels_aot.compile_case(matmul(), arch)
    assert (row.verdict, row.tensor_cores) == ("ok", unit)
    assert row.mix["async"] > 0


def test_turing_has_no_tensor_cores_in_triton_and_the_row_says_so():
    assert kernels_aot.compile_case(matmul("*fp16", tensor_cores=False), "sm_75").mix["tensor"] == 0
    row = kernels_aot.compile_case(matmul("*fp16"), "sm_75")
    assert (row.verdict, row.failed) == ("not for sm_75: Triton uses no tensor cores there", False)
    assert kernels_aot.compile_case(double(constants={}), "sm_75").failed, "a case must be right there too"


def test_a_refusal_fails_everywhere_but_on_turing(monkeypatch):
    def refuse(cubin):
        raise RuntimeError("no such\ninstruction")

    monkeypatch.setattr(kernels_aot, "resources", refuse)
    refused, failed = (kernels_aot.compile_case(double(), arch) for arch in ("sm_75", "sm_80"))
    assert (refused.verdict, refused.failed) == ("refused: RuntimeError: no such instruction", False)
    assert (failed.verdict, failed.failed) == ("FAIL: RuntimeError: no such instruction", True)


@pytest.mark.parametrize(
    ("case", "arch", "fault"),
    [
        (double(tensor_cores=True), "sm_80", "no tensor-core instructions"),
        (matmul(size=128, depth=128, num_stages=4), "sm_80", "shared memory"),
        (matmul(size=256, num_warps=4), "sm_80", "spills"),
        (matmul(demands={"sm_80": r"wgmma\."}), "sm_80", r"no instruction wgmma\."),
        (Case(**vars(double()) | {"kernel": _add_kernel, "signature": double().signature | {"y_ptr": "*fp32"}}),
         "sm_80", "atomic operations"),
        (double(constants={}), "sm_80", "missing ['BLOCK']"),
        (double(aligned=("BLOCK",)), "sm_80", "aligned names ['BLOCK']"),
        (double(signature=double().signature | {"x_ptr": "*bf17"}), "sm_80", "bf17"),
    ],
)  # fmt: skip
def test_each_broken_rule_fails(case, arch, fault):
    row = kernels_aot.compile_case(case, arch)
    assert row.failed
    assert row.verdict.startswith("FAIL: ")
    assert fault in row.verdict


def test_a_compiler_that_dies_or_hangs_costs_one_row(monkeypatch):
    def crash(case, arch, results):
        if case.label == "dies":
            import os

            os._exit(11)
        if case.label == "hangs":
            import time

            time.sleep(60)
        results.send(kernels_aot.Row(kernel="k", case=case.label, arch=arch))

    monkeypatch.setattr(kernels_aot, "_child", crash)
    monkeypatch.setattr(kernels_aot, "CASE_SECONDS", 1)
    jobs = [(double(label=label), "sm_80") for label in ("dies", "hangs", "lives")]
    rows = {row.case: row for row in kernels_aot.compile_all(jobs)}
    assert "status 11" in rows["dies"].verdict
    assert "no result after 1 s" in rows["hangs"].verdict
    assert [rows[name].failed for name in ("dies", "hangs", "lives")] == [True, True, False]


def module_with(*cases: Case) -> ModuleType:
    """This file as a kernel module, with these cases."""
    module = sys.modules[__name__]
    module.CASES = list(cases)
    return module


def test_a_case_is_compiled_for_the_cards_that_it_names():
    everywhere, fp8 = double(), double(archs=("sm_89", "sm_90"))
    jobs = kernels_aot.jobs_of([module_with(everywhere, fp8)], kernels_aot.ARCHS, "")
    assert [arch for case, arch in jobs if case is everywhere] == ["sm_75", "sm_80", "sm_90"]
    assert [arch for case, arch in jobs if case is fp8] == ["sm_89", "sm_90"]
    assert kernels_aot.jobs_of([module_with(fp8)], ["sm_80"], "") == []


def test_sums_and_products_stay_apart_where_the_launcher_keeps_them_apart():
    """Fused, a product and a sum are one instruction; apart, they are two."""
    case = Case(**vars(double()) | {"kernel": _multiply_and_add_kernel})
    fused, apart = (
        kernels_aot.compile_case(Case(**vars(case) | {"fp_fusion": fusion}), "sm_80") for fusion in (True, False)
    )
    assert apart.mix["fma"] == 2 * fused.mix["fma"] > 0


@pytest.mark.parametrize(
    ("module", "form", "arch", "unit"),
    [
        ("int8_gemm", "forward", "sm_80", "mma"),
        ("int8_gemm", "back dropout", "sm_80", "mma"),
        ("int8_gemm", "forward", "sm_90", "wgmma"),
        ("int8_gemm", "back dropout", "sm_90", "wgmma"),
        ("fp8_gemm", "forward", "sm_89", "mma"),
        ("fp8_gemm", "forward", "sm_90", "wgmma"),
        ("fp8_gemm", "back exact dropout", "sm_90", "wgmma"),
    ],
)
def test_eight_bit_products_run_on_eight_bit_units_and_spill_nothing(module, form, arch, unit):
    """The pattern of the other format fails the same code, so the pattern finds what it is for."""
    gpu = importlib.import_module(f"peft_kernels.gpu.{module}")
    label = re.compile(rf"\w+ {form} \d+x\d+x\d+( TMA)?")
    *_, case = (one for one in gpu.CASES if label.fullmatch(one.label) and arch in one.archs)
    row = kernels_aot.compile_case(case, arch)
    assert (row.verdict, row.spill_bytes, row.tensor_cores) == ("ok", 0, unit)
    swapped = case.demands[arch].replace("s8", "u8").replace("e4m3", "e5m2")
    assert kernels_aot.compile_case(Case(**vars(case) | {"demands": {arch: swapped}}), arch).failed


def test_exact_products_add_up_in_fp32_behind_the_units():
    """One addition a step for each of a thread's 128·128/256 sums."""
    gpu = importlib.import_module("peft_kernels.gpu.fp8_gemm")
    (case,) = (one for one in gpu.CASES if re.fullmatch(r"\w+ back exact \d+x\d+x\d+ TMA", one.label))
    short = Case(**vars(case) | {"constants": case.constants | {"EXACT": False}})
    exact, fast = (kernels_aot.compile_case(one, "sm_90").mix["fma"] for one in (case, short))
    assert exact - fast == 64


@pytest.mark.parametrize(
    ("module", "archs"), [("int8_gemm", {"sm_80", "sm_89", "sm_90"}), ("fp8_gemm", {"sm_89", "sm_90"})]
)
def test_every_eight_bit_product_demands_its_unit(module, archs):
    from peft_kernels.gpu._eight_bit_gemm import _product_kernel

    cases = importlib.import_module(f"peft_kernels.gpu.{module}").CASES
    products = [case for case in cases if case.kernel is _product_kernel]
    assert {arch for case in products for arch in case.archs} == archs
    for case in products:
        assert [arch for arch in case.archs if arch not in case.demands] == [], case.label


def test_a_kernel_that_no_case_names_is_found():
    missing = kernels_aot.uncovered([module_with(double(), matmul())])
    others = ("_add_kernel", "_multiply_and_add_kernel", "launched_under_another_name")
    assert missing == [f"{__name__}.{name}" for name in others]


def test_main_prints_a_table_writes_numbers_and_tells_by_its_status(capsys, tmp_path, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    modules = [module_with(double(), matmul("*fp16"))]
    file = tmp_path / "numbers.json"
    good = ["--arch", "sm_80", "--json", str(file), "--kernel", "_kernel"]
    assert kernels_aot.main(good, modules) == 0
    shown = capsys.readouterr().out
    assert "TRITON_DEFAULT_FP_FUSION=" in shown
    assert "_double_kernel" in shown
    rows = json.loads(file.read_text())["rows"]
    assert [(row["case"], row["failed"]) for row in rows] == [("bf16", False), ("*fp16 64x32", False)]
    assert kernels_aot.main(["--arch", "sm_80"], modules) == 1, "some kernels have no case"
    assert "_add_kernel is in no CASES" in capsys.readouterr().out
    assert kernels_aot.main(["--kernel", "nothing_like_it"], modules) == 2
    assert kernels_aot.main(["--arch", "sm_80", "--kernel", "_kernel"], [module_with(double(tensor_cores=True))]) == 1


def test_the_interpreter_is_refused():
    done = subprocess.run(
        [sys.executable, "benchmarks/kernels_aot.py"],
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "TRITON_INTERPRET" in done.stderr


def test_an_autotuned_kernel_is_unwrapped():
    assert kernels_aot.jit_function(SimpleNamespace(fn=SimpleNamespace(fn=_double_kernel))) is _double_kernel


def test_every_kernel_of_the_project_has_a_case():
    modules = kernels_aot.gpu_modules()
    assert modules
    assert kernels_aot.uncovered(modules) == []
