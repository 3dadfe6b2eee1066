"""The section `model` of the settings, and what every section is. See `config`."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from peft_engine.config_frozen import BOUND

Pattern = Annotated[str, Field(min_length=1)]


class Section(BaseModel):
    """A block of settings. Strict: no unknown key, no silent conversion of strings to numbers."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        frozen=True,
        validate_default=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )


class ModelConfig(Section):
    path: str
    """Hub id or local folder of the backbone."""
    hub_id: str | None = None
    """Where the same model lives on the hub; named in messages when `path` is not there, never fetched by itself."""
    revision: str | None = None
    """Hub revision: branch, tag or commit."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Dtype of the frozen weights. `auto`: float32 on CPU and MPS, and wherever all weights are trained; else as
    stored."""
    quantization: Literal["none", "nf4", "fp4", "int8"] = "none"
    """Format in which the frozen linears' weights are kept, by bitsandbytes: `nf4` and `fp4` 4 bits a number with an
    absmax for 64 of them (QLoRA), `int8` 8 bits with one for each row (the weights of LLM.int8(); activations are not
    rounded). Heads, embeddings and norms stay as they are. A checkpoint that is quantised already is taken as it is."""
    double_quantization: bool = True
    """nf4, fp4: keep the absmax in 8 bits too."""
    quantization_skip: list[Pattern] = []
    """Linears that stay as they are: regular expressions, found anywhere in the full module name. Heads always do."""
    frozen_compute: Literal["full", "bf16", "int8", "fp8", "auto"] = "full"
    """Format of the frozen linears' matrix products, forward and backward; their weights take 1 byte (bf16: 2), x and
    gradients are rounded row by row. `full` is the training dtype, `auto` what is fastest on this device where it is
    1.2 times as fast. int8: CPUs with VNNI or AMX, CUDA from Turing on; fp8: CUDA from Ada on; bf16: CPUs with AMX."""
    frozen_outliers: Literal["auto", "none", "smooth", "columns", "both"] = "auto"
    """What is done about input channels much larger than the others, in int8 and fp8, as the first 16 training rows
    show them: `smooth` divides the input's and multiplies the weight's (SmoothQuant), `columns` leaves them in full
    precision (as LLM.int8() does), `both` smooths what is left then. `auto` is both in int8 and fp8; on SmolLM2 only
    both together are within noise of full precision."""
    frozen_error_bound: Annotated[float, Field(gt=0)] = BOUND
    """A linear whose output on the first 16 training rows errs by more, relative to its norm, stays in full precision;
    run.json lists it."""
    frozen_head: Literal["full", "int8"] = "full"
    """Causal LM: the output head inside the loss, where it is frozen; evaluation and generation keep it in full."""
    pooling: Literal["auto", "model", "mean"] = "auto"
    """Text classification: `model` is the model's own pooler and head, `mean` averages the last hidden states over real
    tokens. `auto` reads a sentence-transformers `1_Pooling/config.json` where there is one, and takes `mean` where the
    model's own pooler has no pretrained weights; else `model`."""
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    """Attention code of transformers; `auto` is its own choice. `flash_attention_2` needs CUDA, 16-bit computation and
    the package flash-attn."""
    offload: Literal["none", "layers"] = "none"
    """CUDA: `layers` keeps the frozen layers in pinned host memory and copies each to the card shortly before it runs,
    forward and backward, for models larger than the card."""
    new_tokens: list[Pattern] = []
    """Tokens to add to the vocabulary; their rows of the embeddings are trained and saved with the adapter."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Never on by itself."""
