"""`doctor`: a toy is trained, saved and used from end to end on this machine, and each optional part is tried for real.

Nothing is fetched: models are random, tokenizers are made in memory, all of it in a temporary folder.
"""

import contextlib
import gc
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from .config import Config
from .run import train
from .runtime import cores, memory_bytes
from .using import evaluate, export

Status = Literal["works", "not there", "broken"]
WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "a",
    "lazy",
    "dog",
    "while",
    "seven",
    "grey",
    "cats",
    "watch",
    "from",
    "an",
    "old",
    "wall",
    "near",
    "the",
    "river",
]
STEPS = 6
TOLERANCE = 1e-3  # relative difference of losses with and without fused kernels, fp32
SECONDS = 45.0  # for the two processes, which import torch while the rest runs
GREET = """
import sys, torch, torch.distributed as dist
dist.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=int(sys.argv[2]), world_size=2)
found = torch.full((3,), float(dist.get_rank() + 1))
dist.all_reduce(found)
assert found.tolist() == [3.0] * 3, found
dist.destroy_process_group()
"""


@dataclass(frozen=True)
class Finding:
    """What one check found.

    Attributes:
        needed: training needs it; the others are extras.
        detail: figures, or why not, in one line.
    """

    name: str
    status: Status
    detail: str
    needed: bool = False


class NotThere(Exception):
    """What a check looks for is not on this machine."""


def doctor() -> dict[str, Any]:
    """Try everything.

    Returns:
        {"ok": whether all that is needed works, "seconds", "findings": each a Finding as a dict}.
    """
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="peft-engine-doctor-") as name, _two_processes(Path(name)) as greeted:
        folder = Path(name)
        toys = _Toys(folder)
        findings = [
            _try("cores", _cores),
            _try("memory", _memory),
            _try("disk", _disk, needed=True),
            _try("training", toys.train, needed=True),
            _try("fused kernels", toys.compare, needed=True),
            _try("saving and reloading", toys.reload, needed=True),
            _try("classification", toys.classify, needed=True),
            _try("CUDA", _cuda),
            _try("bf16", lambda: _narrow(torch.bfloat16)),
            _try("fp16", _fp16),
            _try("Triton", _triton),
            _try("bitsandbytes", _bitsandbytes),
            _try("torch.compile", _compile),
            _try("several processes", greeted),
        ]
    ok = all(found.status == "works" for found in findings if found.needed)
    return {"ok": ok, "seconds": time.perf_counter() - began, "findings": [asdict(found) for found in findings]}


def _try(name: str, check: Callable[[], str], needed: bool = False) -> Finding:
    try:
        return Finding(name, "works", check(), needed)
    except NotThere as error:
        return Finding(name, "not there", str(error), needed)
    except Exception as error:  # whatever it is: the next check goes on
        text = " ".join(str(error).split())[:200]
        return Finding(name, "broken", f"{type(error).__name__}: {text}", needed)


class _Toys:
    """Tiny random models with rows to learn, and what training on them gave."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.losses: list[float] = []

    def train(self) -> str:
        summary, self.losses = self._llama("fused", "auto")
        before, after = self.losses[0], self.losses[-1]
        if not after < before:
            raise ValueError(f"the loss did not fall: {before:.4f} → {after:.4f}")
        return f"LoRA on a toy Llama, {summary['device']}, {STEPS} steps, loss {before:.3f} → {after:.3f}"

    def compare(self) -> str:
        if not self.losses:
            raise NotThere("nothing was trained to compare with")
        fused = json.loads((self.folder / "fused" / "run.json").read_text(encoding="utf-8"))["kernels"]
        _, plain = self._llama("plain", "off")
        apart = max(abs(a - b) / abs(b) for a, b in zip(self.losses, plain, strict=True))
        if not apart <= TOLERANCE:
            raise ValueError(f"losses differ from plain PEFT's by {apart:.1e}, bound {TOLERANCE:.0e}")
        return f"{fused['backend']}; losses as without them up to {apart:.0e}"

    def reload(self) -> str:
        if not self.losses:
            raise NotThere("nothing was trained to reload")
        run = self.folder / "fused"
        kept = json.loads((run / "run.json").read_text(encoding="utf-8"))["metrics"]
        found = evaluate(run, kept["split"])["metrics"]["loss"]
        if not math.isclose(found, kept["after"]["loss"], rel_tol=TOLERANCE):
            raise ValueError(f"loss {found} after reloading, {kept['after']['loss']} before")
        _, drift = export(run)
        return f"same loss; logits in plain peft apart by {drift.relative:.0e}"

    def classify(self) -> str:
        words = _tokenizer()
        shape: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
        model = BertModel(
            BertConfig(vocab_size=len(words), max_position_embeddings=64, pad_token_id=0, intermediate_size=64, **shape)
        )
        model.save_pretrained(self.folder / "bert")
        words.save_pretrained(str(self.folder / "bert"))
        rows = [{"text": f"{'a' if i % 2 else 'the'} {_text(i)}", "label": ["no", "yes"][i % 2]} for i in range(40)]
        summary = self._run("text-classification", "bert", rows, "classes", "auto")
        return f"LoRA on a toy BERT, {summary['trainable_parameters']:,} parameters trained"

    def _llama(self, output: str, kernels: str) -> tuple[dict[str, Any], list[float]]:
        words = _tokenizer()
        if not (self.folder / "llama").exists():
            torch.manual_seed(0)
            shape: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
            settings = LlamaConfig(
                vocab_size=len(words),
                intermediate_size=64,
                max_position_embeddings=64,
                eos_token_id=1,
                num_key_value_heads=2,
                **shape,
            )
            LlamaForCausalLM(settings).save_pretrained(self.folder / "llama")
            words.save_pretrained(str(self.folder / "llama"))
        rows = [{"text": _text(i)} for i in range(40)]
        summary = self._run("causal-lm", "llama", rows, output, kernels)
        lines = (self.folder / output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return summary, [row["loss"] for row in map(json.loads, lines) if "loss" in row]

    def _run(self, task: str, model: str, rows: list[dict[str, str]], output: str, kernels: str) -> dict[str, Any]:
        data = self.folder / f"{output}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        tree = {
            "task": task,
            "model": {"path": str(self.folder / model)},
            "adapter": {"rank": 4, "dropout": 0.0},
            "data": {"train": str(data), "cache": None, "near_duplicates": "off"},
            "training": {
                "steps": STEPS, "batch_size": 8, "learning_rate": 0.02, "log_every": 1, "precision": "fp32", "warmup": 0
            },
            "kernels": kernels,
            "output": str(self.folder / output),
        }  # fmt: skip
        return train(Config.model_validate(tree))


def _tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: number for number, word in enumerate(dict.fromkeys(["[PAD]", "[END]", "[UNK]", *WORDS]))}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", eos_token="[END]", unk_token="[UNK]")


def _text(number: int) -> str:
    return " ".join(WORDS[(number + i * (1 + number % 3)) % len(WORDS)] for i in range(4 + number % 5))


def _cores() -> str:
    return f"{cores()} usable, torch computes with {torch.get_num_threads()} threads"


def _memory() -> str:
    found = memory_bytes()
    if found is None:
        raise NotThere("this system does not say how much there is")
    return f"{found / 2**30:.1f} GiB"


def _disk() -> str:
    free = {place: shutil.disk_usage(place).free for place in (".", tempfile.gettempdir())}
    if min(free.values()) < 2**28:
        raise ValueError(f"{min(free.values()) / 2**20:.0f} MiB free, fewer than 256")
    return f"{free['.'] / 2**30:.1f} GiB free here"


def _cuda() -> str:
    if not torch.cuda.is_available():
        built = torch.version.cuda
        raise NotThere(f"torch is built for CUDA {built}, but sees no GPU" if built else "torch is built without CUDA")
    x = torch.eye(64, device="cuda") * 2
    if not bool(((x @ x) == 4 * torch.eye(64, device="cuda")).all()):
        raise ValueError("a product came out wrong")
    properties = torch.cuda.get_device_properties(0)
    return (
        f"{properties.name}, {properties.total_memory / 2**30:.1f} GiB, sm_{properties.major}{properties.minor}, "
        f"{torch.cuda.device_count()} of them, CUDA {torch.version.cuda}"
    )


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _narrow(dtype: torch.dtype) -> str:
    """Forward and backward of a product under autocast, compared with fp32."""
    device = _device()
    if dtype is torch.bfloat16 and device == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise NotThere("this GPU has no bf16 units")
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(64, 64, generator=generator).to(device) for _ in range(2))
    w.requires_grad_()
    with torch.autocast(device, dtype):
        y = x @ w
    y.float().square().sum().backward()
    if y.dtype is not dtype or w.grad is None:
        raise ValueError(f"autocast gave {y.dtype}")
    plain = x @ w.detach()
    apart = float((y.detach().float() - plain).abs().max() / plain.abs().max())
    if not apart < 0.03:
        raise ValueError(f"a product is off by {apart:.1e}")
    return f"autocast on {device}, product apart from fp32 by {apart:.0e}"


def _fp16() -> str:
    if _device() == "cpu":
        raise NotThere("fp16 trains on a GPU only")
    return _narrow(torch.float16)


def _triton() -> str:
    if not torch.cuda.is_available():
        raise NotThere("no GPU")
    from peft_kernels.rms_norm import rms_norm

    try:
        import triton
    except ImportError as error:
        raise NotThere("triton is not installed") from error
    x = torch.randn(37, 96, device="cuda")
    weight = torch.randn(96, device="cuda")
    apart = float(
        (rms_norm(x, weight, 1e-6, backend="triton") - rms_norm(x, weight, 1e-6, backend="torch")).abs().max()
    )
    if not apart < 1e-4:
        raise ValueError(f"our RMSNorm kernel is off by {apart:.1e}")
    return f"{triton.__version__}; our RMSNorm kernel was compiled and run"


def _bitsandbytes() -> str:
    try:
        import bitsandbytes
    except ImportError as error:
        raise NotThere(f"not installed, or it does not load here: {error}") from error
    weight = torch.nn.Parameter(torch.zeros(128, 128, device=_device()))
    optimizer = bitsandbytes.optim.AdamW8bit([weight], lr=0.1)
    for _ in range(2):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    state = {t.dtype for t in optimizer.state[weight].values() if isinstance(t, torch.Tensor)}
    if torch.uint8 not in state or not bool((weight < -0.15).all()):
        raise ValueError("an 8-bit AdamW step did not move a weight as it should")
    return f"{bitsandbytes.__version__}; an 8-bit AdamW step on {_device()}"


def _compile() -> str:
    import torch._dynamo

    if _device() == "cpu" and not any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "g++", "clang++")):
        raise NotThere("it needs a C++ compiler (g++)")
    x = torch.linspace(-2, 2, 100, device=_device())
    began = time.perf_counter()
    compiled = torch.compile(lambda t: (torch.sin(t) * t + 1).relu(), dynamic=False)
    try:
        if not torch.allclose(compiled(x), (torch.sin(x) * x + 1).relu(), atol=1e-5):
            raise ValueError("the compiled function gives other values")
    finally:
        torch._dynamo.reset()
        gc.collect()
    return f"a function was compiled in {time.perf_counter() - began:.0f} s"


@contextlib.contextmanager
def _two_processes(folder: Path) -> Iterator[Callable[[], str]]:
    """Two processes that add up numbers through gloo; they run beside the other checks, and end with them."""
    code = [sys.executable, "-c", GREET, str(folder / "meeting")]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    children = [
        subprocess.Popen([*code, str(rank)], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]

    def collect() -> str:
        for child in children:
            _, said = child.communicate(timeout=SECONDS)
            if child.returncode:
                raise RuntimeError(said.strip().splitlines()[-1] if said.strip() else f"exit code {child.returncode}")
        return "two processes added up numbers through gloo"

    try:
        yield collect
    finally:
        for child in children:
            if child.poll() is None:
                child.kill()
            child.communicate()
