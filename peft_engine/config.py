"""Every setting, declared once: type, default, bounds and the text that the docs and the JSON schema print.

`config_reading.load_config` reads a YAML file into `Config`. Unknown keys are errors; what settings mean for each other
is checked in `config_checks`. Contract: DESIGN.md, "Config".
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from peft_engine.config_checks import cross_faults, dotted

Share = Annotated[float, Field(ge=0.0, lt=1.0)]
Count = Annotated[int, Field(ge=1)]
TaskName = Literal["causal-lm", "text-classification"]


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
    quantization: Literal["none"] = "none"
    """Weight quantisation of the frozen backbone."""
    frozen_compute: Literal["full"] = "full"
    """Precision of the frozen matrix products."""
    pooling: Literal["auto", "model", "mean"] = "auto"
    """Text classification: `model` is the model's own pooler and head, `mean` averages the last hidden states over real
    tokens. `auto` reads a sentence-transformers `1_Pooling/config.json` where there is one, and takes `mean` where the
    model's own pooler has no pretrained weights; else `model`."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Never on by itself."""


class AdapterConfig(Section):
    method: Literal["lora", "full", "head", "bitfit"] = "lora"
    """`lora` trains low-rank updates, `full` all weights, `head` only the task's head (linear probe; the LM head of a
    causal LM), `bitfit` bias terms (and the task's new head)."""
    rank: Count = 16
    """Rank r of each update (LoRA, Hu et al. 2021)."""
    alpha: Annotated[float, Field(gt=0)] = 32
    """Updates are scaled by alpha/rank, or alpha/sqrt(rank) with `rslora`."""
    dropout: Share = 0.05
    """Dropout on the adapter's input."""
    targets: str | list[str] = "all-linear"
    """`all-linear` (every Linear and Conv1D but the output head), one regular expression for full module names, or a
    list of module-name endings. Each must match something."""
    layers: list[Annotated[int, Field(ge=0)]] | None = None
    """Adapt only these layers (indices from 0); null is all."""
    rank_pattern: dict[str, Count] = {}
    """Own rank per module-name pattern (regular expression on the end of the name)."""
    alpha_pattern: dict[str, Annotated[float, Field(gt=0)]] = {}
    """Own alpha per module-name pattern."""
    modules_to_save: list[str] = []
    """Modules trained in full and saved beside the adapter. A task's new head is always among them."""
    rslora: bool = False
    """Scale by alpha/sqrt(rank) (Kalajdzievski 2023)."""
    dora: bool = False
    """Weight-decomposed update with a trained magnitude (DoRA, Liu et al. 2024)."""
    init: Annotated[str, Field(pattern=r"^(default|gaussian|orthogonal|olora|pissa|pissa_niter_[1-9]\d*)$")] = "default"
    """Start of A and B: `default` (Kaiming A, zero B), `gaussian`, `orthogonal`, `olora`, `pissa` or
    `pissa_niter_N`."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Biases trained beside the adapter."""
    lora_plus_ratio: Annotated[float, Field(gt=0)] | None = None
    """LoRA+ (Hayou et al. 2024): learning rate of B as a multiple of A's."""
    options: dict[str, Any] = {}
    """Further fields of the peft config of this method, by peft's own names."""


class SplitConfig(Section):
    eval: Share = 0.1
    """Share of the training data held out for evaluation, where `data.eval` is not given."""
    test: Share = 0.1
    """Share held out as the test split, where `data.test` is not given."""


class LimitConfig(Section):
    train: Count | None = None
    """Keep at most this many rows of the training split (a seeded sample, stratified by label)."""
    eval: Count | None = None
    """Keep at most this many rows of the evaluation split."""
    test: Count | None = None
    """Keep at most this many rows of the test split."""


class DataConfig(Section):
    train: str
    """File (csv, tsv, jsonl, json, parquet, txt; .gz of text formats), or hub data set as `name` or `name:split`."""
    eval: str | None = None
    """Evaluation data, same forms; null makes it by `split`."""
    test: str | None = None
    """Test data, same forms; null makes it by `split`."""
    subset: str | None = None
    """Configuration name of a hub data set."""
    split: SplitConfig = SplitConfig()
    """Shares of the splits that are not given."""
    limit: LimitConfig = LimitConfig()
    """Row limits per split, after splitting."""
    columns: dict[Literal["text", "label", "messages", "tools", "prompt", "completion"], str] = {}
    """Which of the file's columns play which part; what is not named is found by convention."""
    max_length: Annotated[int, Field(ge=2)] = 512
    """Tokens per sequence. Longer plain text is cut into windows, longer conversations and inputs at their end."""
    packing: Literal[False] = False
    """Several samples in one sequence."""
    supervise: Literal["auto", "assistant", "last", "all"] = "auto"
    """Causal LM: which tokens are learned. `assistant` is every assistant turn, `last` the last one, `all` everything;
    `auto` is `assistant` for messages, the completion for prompt/completion, `all` for text."""
    label_type: Literal["auto", "single", "multi", "regression"] = "auto"
    """Text classification: one class, several classes, or a number per row. `auto`: lists are multi, floats
    regression."""
    labels: list[str | int] | None = None
    """Class names in order of their ids; null sorts what the training split holds."""
    max_dropped: Annotated[float, Field(ge=0.0, le=1.0)] = 0.05
    """Refuse when a larger share of rows than this would be dropped because truncation removes all they teach."""
    group_by_length: bool = True
    """Batch sequences of like length together (still shuffled, seeded)."""
    cache: str | None = "auto"
    """Folder of tokenised data, keyed by content; `auto` is `peft-engine` in the user's cache folder, null is none."""
    seed: int = 0
    """Seed of the splits and limits, apart from `training.seed` so that seeds share their splits."""


class EarlyStoppingConfig(Section):
    patience: Count
    """Stop after this many evaluations without improvement."""
    min_delta: Annotated[float, Field(ge=0)] = 0.0
    """What counts as an improvement of the primary metric."""


class TrainingConfig(Section):
    epochs: Annotated[float, Field(gt=0)] = 3
    """Passes over the training split."""
    steps: Count | None = None
    """Optimizer steps; overrides `epochs`."""
    batch_size: Count = 16
    """Sequences per optimizer step over all processes: what the mathematics sees."""
    micro_batch_size: Literal["auto"] | Count = "auto"
    """Sequences in memory at once. `auto` starts at `batch_size` and halves on out-of-memory."""
    learning_rate: Annotated[float, Field(gt=0)] = 2e-4
    """Peak learning rate."""
    schedule: Literal["constant", "linear", "cosine", "wsd"] = "cosine"
    """Learning rate after warm-up, in optimizer steps. `wsd`: constant, then linear decay over the last fifth."""
    warmup: Annotated[float, Field(ge=0)] = 0.03
    """Linear warm-up: below 1 a share of all steps, else a number of steps."""
    optimizer: Literal["adamw", "sgd", "adafactor", "adamw8bit"] = "adamw"
    """`adamw8bit` is bitsandbytes' (CPU and CUDA)."""
    betas: Annotated[tuple[Share, Share], Field(strict=False)] = (0.9, 0.999)
    """AdamW's moments; the first is SGD's momentum."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled decay, not on biases and norms."""
    max_grad_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """Clip the gradient's global norm; null is off."""
    seed: int = 0
    """Seed of initialisation, data order and dropout."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Autocast dtype. `auto`: bf16 on CUDA that has it, fp16 on older CUDA, else fp32. Trained weights are fp32."""
    gradient_checkpointing: bool = False
    """Recompute activations in backward: less memory, about a third more time."""
    log_every: Count = 10
    """Optimizer steps between rows of metrics.jsonl."""
    eval_every: Count | None = None
    """Optimizer steps between evaluations; null is once per epoch."""
    save_every: Count | None = None
    """Optimizer steps between checkpoints; null is once per epoch."""
    save_total_limit: Count = 2
    """Checkpoints to keep; the newest complete one is never deleted."""
    early_stopping: EarlyStoppingConfig | None = None
    """Stop when the primary metric on the evaluation split no longer improves."""
    restore_best: bool = False
    """End with the weights of the best evaluation instead of the last."""
    deterministic: bool = True
    """Same bits on the same machine, versions, threads and number of processes."""


class EvaluationConfig(Section):
    batch_size: Count | None = None
    """Sequences at once; null is `training.batch_size`."""
    generate_rows: Annotated[int, Field(ge=0)] = 0
    """Causal LM: generate the last turn of this many rows and report the exact match; 0 is off."""
    max_new_tokens: Count = 32
    """Tokens to generate per row."""


class BudgetConfig(Section):
    max_usd: Annotated[float, Field(gt=0)] | None = None
    """Stop with a complete checkpoint (exit 6) when the run has cost this much; needs `usd_per_hour`."""
    max_hours: Annotated[float, Field(gt=0)] | None = None
    """Stop with a complete checkpoint (exit 6) after this time."""
    usd_per_hour: Annotated[float, Field(ge=0)] | None = None
    """Price of this machine; `cost_usd` is recorded where it is set."""


class Config(Section):
    """A whole run. Paths are relative to the current directory."""

    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    """`auto` takes CUDA, then MPS, then CPU."""
    task: TaskName
    """What is learned."""
    model: ModelConfig
    """The frozen backbone."""
    adapter: AdapterConfig = AdapterConfig()
    """What is trained on it."""
    data: DataConfig
    """What it learns from."""
    training: TrainingConfig = TrainingConfig()
    """How it is trained."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """How it is judged."""
    kernels: Literal["auto", "triton", "torch", "off"] = "auto"
    """Fused kernels: triton (CUDA only), torch (any device), auto (the first that runs here), off (plain PEFT).
    run.json says which ran, on what, and what was left as it is."""
    budget: BudgetConfig = BudgetConfig()
    """Limits and the price."""
    output: str
    """Run directory."""

    @model_validator(mode="after")
    def _consistent(self) -> "Config":
        faults = cross_faults(self.model_dump(exclude_unset=True), self.model_dump())
        if faults:
            raise ValueError("; ".join(f"{dotted(fault.path)}: {fault.text}" for fault in faults))
        return self
