"""Models that are not there, not whole, or not what the adapter asks for."""

from pathlib import Path

from .case import Case, cut_short, edit, inside, model, without

CASES = {
    "no such folder": Case(
        "train c.yaml --set model.path=./modle", 2, ("./modle",), ("model",), make=inside("model", Path.mkdir)
    ),
    "not on the hub, offline": Case(
        "train c.yaml --set model.path=nobody/no-such-model",
        2,
        ("nobody/no-such-model",),
        ("HF_HUB_OFFLINE", "local folder"),
        cold=True,
    ),
    "model is a file": Case("train c.yaml --set model.path=rows.jsonl", 2, ("rows.jsonl", "is a file"), ("folder",)),
    "folder without config.json": Case(
        "train c.yaml --set model.path=model",
        2,
        ("config.json",),
        ("save_pretrained",),
        make=inside("model", Path.mkdir),
    ),
    "folder without weights": Case(
        "train c.yaml --set model.path=model",
        2,
        ("model.safetensors",),
        ("folder",),
        make=model("bert", without("model.safetensors")),
    ),
    "corrupt weights": Case(
        "train c.yaml --set model.path=model",
        8,
        ("model",),
        ("Fetch the model again",),
        make=model("bert", cut_short("model.safetensors")),
    ),
    "corrupt config.json": Case(
        "train c.yaml --set model.path=model",
        2,
        ("config.json",),
        ("folder's files",),
        make=model("bert", cut_short("config.json")),
    ),
    "no tokenizer": Case(
        "train c.yaml --set model.path=model",
        2,
        ("no tokenizer",),
        ("tokenizer.json",),
        make=model("bert", without("tokenizer.json", "tokenizer_config.json")),
    ),
    "unknown architecture": Case(
        "train c.yaml --set model.path=model",
        2,
        ("model", "quux"),
        ("Upgrade transformers",),
        make=model("bert", edit("config.json", model_type="quux")),
    ),
    "code of its own": Case(
        "train c.yaml --set model.path=model",
        2,
        ("Python code",),
        ("model.trust_remote_code",),
        make=model("bert", edit("config.json", model_type="quux", auto_map={"AutoConfig": "own.Config"})),
    ),
    "weights of another shape": Case(
        "train c.yaml --set model.path=model",
        2,
        ("encoder.layer.2", "start at random"),
        ("architecture",),
        make=model("bert", edit("config.json", num_hidden_layers=3)),
    ),
    "target that matches nothing": Case("train c.yaml --set adapter.targets=[q_proj]", 2, ("q_proj",), ("query",)),
    "module to save that is not there": Case(
        "train c.yaml --set adapter.modules_to_save=[clasifier]", 2, ("clasifier",), ("Nearest: classifier",)
    ),
    "layer out of range": Case("train c.yaml --set adapter.layers=[7]", 2, ("layer 7",), ("0 to 1",)),
    "pattern that matches nothing": Case(
        "train c.yaml --set 'adapter.rank_pattern={qery: 4}'", 2, ("qery",), ("query",)
    ),
    "bitfit without biases": Case("train m.yaml --set 'adapter={method: bitfit}'", 2, ("bitfit", "Llama"), ("lora",)),
    "peft option that is none": Case(
        "train c.yaml --set 'adapter.options={init_lora: 1}'", 2, ("init_lora",), ("nearest",)
    ),
}
