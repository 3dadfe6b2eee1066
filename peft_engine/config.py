"""Every setting, declared once: type, default, bounds and the text that the docs and the JSON schema print.

`config_reading.load_config` reads a YAML file into `Config`. Unknown keys are errors; what settings mean for each other
is checked in `config_checks`. Contract: DESIGN.md, "Config".
"""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from peft_engine.answers import AnswerKind
from peft_engine.config_checks import cross_faults
from peft_engine.config_faults import dotted
from peft_engine.config_methods import MethodName
from peft_engine.config_model import ModelConfig, Pattern, Section

Share = Annotated[float, Field(ge=0.0, lt=1.0)]
Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]  # as NumPy takes them
TaskName = Literal[
    "causal-lm",
    "text-classification",
    "token-classification",
    "seq2seq",
    "image-classification",
    "dpo",
    "orpo",
    "kto",
    "reward",
]
Part = Literal[
    "text",
    "label",
    "messages",
    "tools",
    "prompt",
    "completion",
    "text_pair",
    "choices",
    "tokens",
    "tags",
    "source",
    "target",
    "image",
    "chosen",
    "rejected",
]


class LayersConfig(Section):
    """A run of layers at one end of the stack."""

    first: Count | None = None
    """The first so many layers."""
    last: Count | None = None
    """The last so many layers."""


class AdapterConfig(Section):
    method: MethodName = "lora"
    """`lora` trains low-rank updates, `full` all weights, `head` only the task's head (linear probe; the LM head of a
    causal LM), `bitfit` bias terms (and the task's new head). `houlsby`, `pfeiffer` and `parallel` are bottleneck
    adapters. All other names are methods of the peft library."""
    rank: Count = 16
    """Rank r of each update (LoRA, Hu et al. 2021), of methods that train about r·(in + out) numbers per module: lora,
    loha, lokr, hira, gralora, delora, deft, glora, hra, shira, poly; adalora's average rank at the end (it starts at
    1.5 times it); the width of bottleneck adapters. Where peft's `r` counts something else (vera, miss, randlora,
    psoft, ...), peft's default holds and `options: {r: 256}` changes it."""
    alpha: Annotated[float, Field(gt=0)] = 32
    """Updates are scaled by alpha/rank, or alpha/sqrt(rank) with `rslora`: lora, adalora, loha, lokr, gralora, and the
    output of `parallel`. Other scales of peft's methods go under `options`."""
    dropout: Share = 0.05
    """Dropout on the adapter's input, where the method has it (lora, adalora, hira, vera, randlora, miss, ...)."""
    targets: str | list[str] = "all-linear"
    """`all-linear` (every Linear and Conv1D but the output head; where a model has none, as convolutional ones, every
    convolution but grouped ones that the method can't take; the norms for `layernorm`), one regular expression for full
    module names, or a list of module-name endings. Each must match something."""
    layers: list[Annotated[int, Field(ge=0)]] | LayersConfig | None = None
    """Adapt only these layers: indices from 0, or `{last: 6}`, or `{first: 6}`; null is all."""
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
    init: Annotated[
        str, Field(pattern=r"^(default|gaussian|orthogonal|olora|pissa|pissa_niter_[1-9]\d*|loftq|eva|lora-ga)$")
    ] = "default"
    """Start of A and B: `default` (Kaiming A, zero B), `gaussian`, `orthogonal`, `olora`, `pissa`, `pissa_niter_N`,
    `loftq` (the rounding error of a quantised backbone, its best approximation of that rank; Li et al. 2023), or from
    training batches: `eva` (principal inputs, Paischer et al. 2024) or `lora-ga` (gradients, Wang et al. 2024)."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Biases trained beside the adapter."""
    lora_plus_ratio: Annotated[float, Field(gt=0)] | None = None
    """LoRA+ (Hayou et al. 2024): learning rate of B as a multiple of A's."""
    options: dict[str, Any] = {}
    """Further fields of the peft config of this method, by peft's own names (`num_virtual_tokens` of the prompt methods
    is 20 by default). Bottleneck adapters have `activation`."""
    start_from: str | None = None
    """Warm start: a run directory or an adapter folder with the same method and shapes, whose weights this run starts
    from (its optimizer and schedule start anew)."""


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


class SourceConfig(Section):
    """One part of a mixture."""

    path: str
    """File, folder or hub data set."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """How often a row of it is seen in an epoch of training: 2 is twice, 0.5 is a fresh half of its rows in each."""
    columns: dict[Part, str] = {}
    """Columns of this source, where they are not those of `data.columns`."""


class CleanConfig(Section):
    """What is done with faulty rows. Every row that is dropped is counted and reported."""

    malformed: Literal["refuse", "drop"] = "refuse"
    """Rows that can't be read or lack a part that is needed, in any split. More than half of a file is refused."""
    empty: Literal["refuse", "drop"] = "refuse"
    """Rows of which a part (text, label, words, choices, messages, image) is empty or null, in any split."""
    duplicates: Literal["keep", "drop"] = "keep"
    """Rows that repeat an earlier one of their split, answer included."""
    contradictory: Literal["keep", "drop", "majority"] = "keep"
    """Training rows with one input and different answers: `drop` all of them, or keep those with the most frequent
    answer."""


class ImageAugmentConfig(Section):
    """Changes to training images, drawn anew in each epoch from `training.seed`. All off by default."""

    flip: Share = 0.0
    """Probability of a horizontal mirror image."""
    crop: Share = 0.0
    """Largest share of height and width that a random crop cuts away (then resized back)."""
    colour: Share = 0.0
    """Largest relative change of brightness, contrast and saturation."""
    randaugment: Annotated[int, Field(ge=0, le=10)] = 0
    """RandAugment (Cubuk et al. 2020): operations per image; 0 is off."""
    magnitude: Annotated[int, Field(ge=1, le=30)] = 9
    """RandAugment's magnitude, of 30."""


class TextAugmentConfig(Section):
    """Changes to training texts, drawn anew in each epoch from `training.seed`. All off by default. Never labels,
    never supervised tokens."""

    token_dropout: Share = 0.0
    """Share of tokens left out."""
    masking: Share = 0.0
    """Share of tokens replaced by the tokenizer's mask token (or its unknown token)."""
    punctuation: Share = 0.0
    """Probability per word gap of a punctuation mark put in (AEDA, Karimi et al. 2021)."""


class AugmentConfig(Section):
    image: ImageAugmentConfig = ImageAugmentConfig()
    """Changes to training images."""
    text: TextAugmentConfig = TextAugmentConfig()
    """Changes to training texts."""


class DataConfig(Section):
    train: Annotated[str | list[SourceConfig], Field(union_mode="left_to_right")]
    """File (csv, tsv, jsonl, json, parquet, arrow, txt; .gz of text formats), image folder, or hub data set as `name`
    or `name:split`; or a list of `{path, weight}`, a mixture."""
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
    columns: dict[Part, str] = {}
    """Which of the file's columns play which part; what is not named is found by convention."""
    max_length: Annotated[int, Field(ge=2)] = 512
    """Tokens per sequence (seq2seq: of source and target each; choices: of each with its text). Longer plain text is
    cut into windows, longer conversations and inputs at their end."""
    packing: bool = False
    """Causal LM: several samples in one sequence, each blind to the others, so that little or nothing is padded. The
    optimizer step sees the same samples and computes the same loss; models in which a sample would see another are
    refused. Dropout masks are named by the pack, so with dropout a packed run draws others than an unpacked one."""
    pack_tokens: Annotated[int, Field(ge=2)] | None = None
    """Tokens of a pack at most (a longer sample stands alone); null is `max_length`. A pack's attention costs its
    length squared but with flash attention: for short samples a few times their length is enough."""
    streaming: bool = False
    """Keep the rows of `train` and their tokens on disk (in `cache`; where that is null in the run directory, until the
    run ends), for data larger than memory. One file that can be read row by row (jsonl, csv, tsv, txt, parquet, arrow;
    not json), or a folder of `datasets`' save_to_disk; `eval` and `test` files must fit. Made splits are drawn by a
    seeded hash of the input."""
    clean: CleanConfig = CleanConfig()
    """What is done with faulty rows."""
    near_duplicates: Literal["off", "report", "drop"] = "report"
    """Training rows that nearly repeat an evaluation or test row (MinHash over word 3-grams where `datasketch` is
    installed, else equal but for case, punctuation and spacing): report them, or drop them from training. Images are
    only compared exactly."""
    near_threshold: Annotated[float, Field(gt=0, le=1)] = 0.8
    """Jaccard similarity from which on two rows are near duplicates."""
    class_weights: Literal["none", "balanced"] | dict[str, Annotated[float, Field(gt=0)]] = "none"
    """Weight of each class in the training loss, a mean weighted over the whole batch; evaluation is not weighted.
    `balanced` is inverse to its frequency, mean 1 over the rows; by name, classes that are not named weigh 1."""
    augment: AugmentConfig = AugmentConfig()
    """Changes to training rows."""
    image_size: Annotated[int, Field(ge=8)] | None = None
    """Height and width of what the model sees; null is the processor's own size. The share of an image that the
    processor cuts off at the edges stays the same."""
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
    """Sequences in memory at once. `auto` starts at `batch_size` and halves on out-of-memory, but not with `parallel:
    fsdp` or `optimizer_in_backward`. With `data.packing` as many packs as need no more tokens than that many of the
    step's longest sample, but at least one pack."""
    learning_rate: Annotated[float, Field(gt=0)] = 2e-4
    """Peak learning rate."""
    schedule: Literal["constant", "linear", "cosine", "wsd"] = "cosine"
    """Learning rate after warm-up, in optimizer steps. `wsd`: constant, then linear decay over the last fifth."""
    warmup: Annotated[float, Field(ge=0)] = 0.03
    """Linear warm-up: below 1 a share of all steps, else a number of steps."""
    optimizer: Literal["adamw", "sgd", "adafactor", "adamw8bit", "paged_adamw", "paged_adamw8bit"] = "adamw"
    """`adamw8bit` is bitsandbytes' (CPU and CUDA), with moments in 8 bits, of tensors under 4,096 numbers in fp32. The
    paged ones keep theirs, of tensors of 100,000 numbers and more, in memory that CUDA moves to the host when the GPU
    is full (CUDA only)."""
    betas: Annotated[tuple[Share, Share], Field(strict=False)] = (0.9, 0.999)
    """AdamW's moments; the first is SGD's momentum."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled decay, not on biases and norms."""
    max_grad_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """Clip the gradient's global norm; null is off."""
    seed: Seed = 0
    """Seed of initialisation, data order and dropout."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Autocast dtype. `auto`: bf16 on CUDA that has it, fp16 on older CUDA, else fp32. Trained weights are fp32."""
    gradient_checkpointing: bool | Count | list[Pattern] = False
    """Recompute activations in backward: less memory, about a third more time. A number k does so in every k-th layer
    of each stack, regular expressions in the layers whose full name one of them finds."""
    activation_offload: Literal["none", "cpu"] = "none"
    """CUDA: keep what forward saves for backward in pinned host memory in between."""
    optimizer_in_backward: bool = False
    """Update each tensor as soon as its gradient is there, and let that go: no gradients are kept. Needs
    `max_grad_norm: null` and a step in one micro-batch; most of it is won with `adapter.method: full`."""
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
    trainable: list[Pattern] | None = None
    """Train only those of the method's tensors whose full name one of these regular expressions finds; the others keep
    their start and are saved with them. null is all."""
    frozen: list[Pattern] = []
    """Never train tensors whose full name one of these regular expressions finds."""
    neftune_alpha: Annotated[float, Field(gt=0)] | None = None
    """NEFTune (Jain et al. 2023): uniform noise on the input embeddings in training, scaled by alpha/sqrt(length x
    width); null is off."""
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Exponential moving average of the trained weights after each update (its start corrected, so that a short run is
    not held back by the weights it began with); evaluations and the saved adapter use the average."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """With several processes: `ddp` holds the backbone on each, `fsdp` shares its frozen weights out (FSDP2)."""
    deterministic: bool = True
    """Same bits on the same machine, versions, threads and number of processes."""


class EvaluationConfig(Section):
    batch_size: Count | None = None
    """Sequences at once; null is `training.batch_size`."""
    generate_rows: Annotated[int, Field(ge=0)] = 0
    """Causal LM and seq2seq: generate the answer of this many rows and report exact match (seq2seq: ROUGE, BLEU and
    chrF too); 0 is off."""
    max_new_tokens: Count = 32
    """Tokens to generate per row."""
    answer: AnswerKind = "text"
    """Causal LM: exact match compares the whole answer, or the `number` behind its "The answer is:" or "####"."""
    num_beams: Count = 1
    """Seq2seq: beams of the search; 1 is greedy."""


class PreferenceConfig(Section):
    """Tasks dpo, orpo, kto and reward, which TRL's trainers train."""

    beta: Annotated[float, Field(gt=0)] = 0.1
    """Strength of the pull to the reference model (DPO, KTO), or weight of the odds ratio (ORPO)."""
    options: dict[str, Any] = {}
    """Further fields of TRL's config of this task, by TRL's own names."""


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
    preference: PreferenceConfig = PreferenceConfig()
    """Preference tuning."""
    budget: BudgetConfig = BudgetConfig()
    """Limits and the price."""
    report_to: Literal["none"] | list[Literal["tensorboard", "wandb", "mlflow", "trackio"]] = "none"
    """Trackers that get the numbers of metrics.jsonl as well (each an optional package). Their files stay in
    `<output>/trackers`; wandb is offline unless WANDB_MODE says otherwise, mlflow local unless MLFLOW_TRACKING_URI
    does."""
    output: str
    """Run directory."""

    @model_validator(mode="after")
    def _consistent(self) -> "Config":
        faults = cross_faults(self.model_dump(exclude_unset=True), self.model_dump())
        if faults:
            raise ValueError("; ".join(f"{dotted(fault.path)}: {fault.text}" for fault in faults))
        return self
