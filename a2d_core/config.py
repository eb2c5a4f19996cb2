"""The configuration of every stage: frozen dataclasses, checked when they are made.

A recipe is one `Recipe`: a part for each stage, the compute profile, and tracking. Recipes come from the TOML presets
(`a2d_core.presets`). A field is changed with `dataclasses.replace`, or with `stage.field=value` on a command line
(`a2d_core.settings`); a misspelt field raises. The string under a field is its meaning, which `settings.describe` reads
for `--help` and for the docs.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, Literal

OBJECTIVES = ("mdlm", "bd3lm")
STRATEGIES = ("ddp", "fsdp2", "zero2")


class UserError(ValueError):
    """A mistake that the user can mend: the message names the value that was given and the remedy."""


class StoppedError(RuntimeError):
    """Training was told to stop, and has saved what it had: the message says how to go on."""


def require(condition: bool, message: str) -> None:
    """Raise `UserError(message)` unless the condition holds."""
    if not condition:
        raise UserError(message)


def _require_at_least(least: int, config: Any, *names: str, prefix: str = "") -> None:
    """Raise `UserError` where one of these fields is set, and lower than `least`."""
    for name in names:
        value = getattr(config, name)
        require(value is None or value >= least, f"{prefix}{name} must be at least {least}, not {value}")


def check_objective(objective: str) -> str:
    """Return `objective`, or raise `UserError` where it is not one of `OBJECTIVES`."""
    require(objective in OBJECTIVES, f"unknown objective '{objective}': choose one of {', '.join(OBJECTIVES)}")
    return objective


def check_strategy(strategy: str) -> str:
    """Return `strategy`, or raise `UserError` where it is neither one of `STRATEGIES` nor named like a configuration file."""
    require(
        strategy in STRATEGIES or strategy.endswith((".yaml", ".yml", ".json")),
        f"unknown strategy '{strategy}': choose one of {', '.join(STRATEGIES)}, or give the path of an accelerate configuration (.yaml)",
    )
    return strategy


@dataclass(frozen=True)
class ConvertConfig:
    """How an autoregressive checkpoint becomes a diffusion checkpoint."""

    model: str = "embedded"
    """Hugging Face directory or Hub id of the autoregressive model; `embedded` trains the tiny one."""
    revision: str | None = None
    """Branch, tag or commit of a Hub model."""
    block_size: int = 32
    """Tokens per block of a bd3lm checkpoint (mdlm has one block: the whole sequence)."""
    right_shift: bool = False
    """Keep the autoregressive shift: the logit at position i predicts token i+1 (mdlm only)."""
    mask_token: str = "<|mask|>"
    """Text of the mask token to add if the tokenizer has none of its own."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the saved weights; `auto` keeps the source's."""
    trust_remote_code: bool = False
    """Run Python code that comes with a Hub model."""
    allow_pickle: bool = False
    """Read pickled weights, which can run code, if there are none in safetensors."""

    def __post_init__(self) -> None:
        _require_at_least(1, self, "block_size", prefix="convert.")
        require(bool(self.mask_token), "convert.mask_token must not be empty: give the token's text, such as <|mask|>")


@dataclass(frozen=True)
class Source:
    """One of the data sets that `dataset` names, with what stands in brackets behind it."""

    ref: str
    """Hub id, file, directory, or `embedded:...`."""
    config: str | None = None
    """Configuration (subset) name, for this data set alone."""
    split: str | None = None
    """Split to train on, for this data set alone."""
    train: int | None = None
    """Rows to draw from the training part; None takes all."""
    test: int | None = None
    """Rows to draw from the held-out part; None takes all."""
    filters: tuple[tuple[str, str], ...] = ()
    """(column, value): only rows with this value are read."""


def parse_sources(spec: str) -> tuple[Source, ...]:
    """The data sets in `ref[key:value,...]+ref+...`: keys train, test (or eval), config, split, and else the name of a column.

    Raises `UserError` where `spec` is not of this form.
    """
    form = f"'{spec}' does not name data sets: %s. Write them like owner/name[train:10000,test:1000]+talks.jsonl[lang:python]"
    sources = []
    for part in re.split(r"\+(?![^\[]*\])", spec):  # a + inside brackets is part of a value
        found = re.fullmatch(r"\s*([^\[\]]*[^\[\]\s])\s*(?:\[([^\[\]]*)\])?\s*", part)
        require(found is not None, form % f"'{part}' is not a name with brackets behind it at most")
        ref, inside = found.groups()  # type: ignore[union-attr]
        options: dict[str, Any] = {}
        filters: dict[str, str] = {}
        for entry in inside.split(",") if inside is not None else ():
            key, colon, value = (text.strip() for text in entry.partition(":"))
            require(bool(key and colon and value), form % f"'{entry}' in the brackets of '{ref}' is not key:value")
            key = "test" if key == "eval" else key
            require(key not in options and key not in filters, form % f"'{key}' stands twice in the brackets of '{ref}'")
            if key in ("train", "test"):
                require(value.isdecimal() and int(value) >= 1, form % f"{key}:{value} of '{ref}' is not a number of rows")
                options[key] = int(value)
            elif key in ("config", "split"):
                options[key] = value
            else:
                filters[key] = value
        sources.append(Source(ref, filters=tuple(filters.items()), **options))
    return tuple(sources)


@dataclass(frozen=True)
class TrainConfig:
    """One run of training: pretraining on text, or supervised fine-tuning (SFT) on conversations."""

    enabled: bool = True
    """Run this stage; if false, its input checkpoint is passed on unchanged."""
    dataset: str = "embedded:corpus"
    """Hub id, file, directory, or `embedded:corpus` / `embedded:tasks`; join several with `+`, choose rows with `[train:1000,lang:en]`."""
    dataset_config: str | None = None
    """Configuration (subset) name of a Hub data set; `[config:NAME]` for one of several."""
    train_split: str = "train"
    """Split to train on."""
    eval_split: str | None = None
    """Split to evaluate on; without one, `eval_fraction` of the training split is held out."""
    eval_fraction: float = 0.05
    """Fraction of the training split that is held out if there is no `eval_split`."""
    max_eval_rows: int = 512
    """The most held-out rows to score at each evaluation."""
    streaming: bool = False
    """Read the text while training, instead of downloading and tokenising it beforehand (pretraining; needs `max_steps`)."""
    shuffle_buffer: int = 10_000
    """Documents of a stream that are held in memory and shuffled."""
    num_workers: int = 1
    """Processes that filter, read and tokenise data that is not streamed."""
    text_field: str | None = None
    """Column with the text (pretraining); None takes the known data set's own, or `text`."""
    messages_field: str | None = None
    """Column with the list of {role, content} messages (SFT); None tries the usual layouts."""
    prompt_field: str | None = None
    """Column with the prompt, for SFT data in two columns instead of messages."""
    response_field: str | None = None
    """Column with the response, for SFT data in two columns instead of messages."""
    max_length: int = 512
    """Tokens per row: text is cut into rows of this length; for conversations that are longer see `too_long`."""
    insert_eos: bool = True
    """Put the end-of-sequence token between documents (pretraining)."""
    pack: bool = False
    """Keep the documents in a row apart: each attends only to itself, from position 0."""
    supervise: Literal["all", "last"] = "all"
    """Assistant turns to learn: all, or only the last of each conversation, as in the published recipes (SFT)."""
    too_long: Literal["drop", "truncate"] = "drop"
    """Drop turns that end beyond `max_length`, or keep their first `max_length` tokens, as in the published recipes (SFT)."""
    epochs: float = 1.0
    """Passes over the training rows; `max_steps` wins if it is set."""
    max_steps: int = -1
    """Optimizer steps; -1 takes `epochs` instead."""
    batch_size: int = 16
    """Rows per process and micro-batch."""
    gradient_accumulation_steps: int = 1
    """Micro-batches per optimizer step."""
    group_by_length: bool = False
    """Batch rows of similar length: less padding, but a less random order."""
    learning_rate: float = 1e-4
    """Peak learning rate of AdamW."""
    lr_scheduler: Literal["cosine", "linear", "constant", "constant_with_warmup"] = "cosine"
    """Shape of the learning rate over training."""
    warmup_ratio: float = 0.1
    """Fraction of the steps during which the learning rate rises."""
    weight_decay: float = 0.0
    """Weight decay of AdamW."""
    max_grad_norm: float = 1.0
    """Gradients with a larger norm are scaled down to this one."""
    explode_factor: float = 1000.0
    """Stop if the gradient's norm exceeds this many times both max_grad_norm and the median of the logged norms; 0 never stops."""
    adam_beta2: float = 0.999
    """Second-moment decay of AdamW."""
    views: int = 1
    """Noised views (copies) of each row per step; bd3lm computes the clean stream once for all of them."""
    complementary: bool = False
    """Views come in pairs of a mask and its complement, so that each pair scores every maskable token once."""
    schedule: Literal["linear", "cosine"] = "linear"
    """Noise schedule alpha(t)."""
    t_draws: Literal["stratified", "iid", "per_sequence"] = "stratified"
    """How diffusion times are drawn: stratified over rows and blocks, independent, or one per row."""
    t_min: float = 1e-3
    """Smallest diffusion time, usually called eps."""
    t_max: float = 1.0
    """Largest diffusion time; a loss over less than [eps, 1] is not a NELBO."""
    weighting: Literal["nelbo", "uniform"] = "nelbo"
    """Weight of a masked token's cross-entropy: w(t) of the NELBO, or 1."""
    predict_mask_token: bool = False
    """Leave the mask token's logit in the softmax while training, as the published recipes do."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Compute precision; `auto` is bfloat16 where the hardware multiplies it natively. Master weights stay float32."""
    attention: Literal["auto", "sdpa", "flex_attention", "eager"] = "auto"
    """Attention kernel; `auto` is FlexAttention on CUDA, which skips what nobody sees, and elsewhere the model's own."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    compile: bool = False
    """Compile the network's layers with torch.compile, which takes a minute at the start and needs a C++ compiler."""
    lora_rank: int = 0
    """Rank of LoRA adapters on the linear layers; they and the mask token's embedding are trained alone. 0 trains all weights."""
    lora_alpha: float = 32.0
    """The adapters' output is scaled by lora_alpha / lora_rank."""
    lora_targets: tuple[str, ...] = ()
    """Names of the linear layers that get adapters, such as q_proj; if empty, all except the output embedding."""
    eval_every: float = 0.1
    """Evaluate after this fraction of the steps (1 or more: after so many steps)."""
    save_every: float = 0.1
    """Save a checkpoint after this fraction of the steps (1 or more: after so many steps)."""
    keep_checkpoints: int = 2
    """How many of the newest training checkpoints to keep, besides the one with the best held-out NELBO; others are deleted."""
    log_every: int = 10
    """Optimizer steps between two logged losses."""

    def __post_init__(self) -> None:
        _require_at_least(1, self, "batch_size", "gradient_accumulation_steps", "views", "max_eval_rows", "shuffle_buffer", "num_workers")
        _require_at_least(1, self, "keep_checkpoints", "log_every")
        _require_at_least(2, self, "max_length")
        _require_at_least(0, self, "weight_decay")
        parse_sources(self.dataset)
        require(
            not self.streaming or self.max_steps >= 1,
            "streaming=true needs max_steps, because a stream has no length: say how many optimizer steps to take",
        )
        require(
            not (self.streaming and self.group_by_length), "group_by_length=true needs to know all rows: leave it out with streaming=true"
        )
        require(self.max_steps == -1 or self.max_steps >= 1, f"max_steps must be -1 (use epochs) or at least 1, not {self.max_steps}")
        require(self.explode_factor >= 0, f"explode_factor must be 0 (let every finite norm pass) or above, not {self.explode_factor}")
        for name in ("warmup_ratio", "adam_beta2"):
            require(0 <= getattr(self, name) < 1, f"{name} must lie in [0, 1), not {getattr(self, name)}")
        require(0 < self.eval_fraction < 1, f"eval_fraction must lie in (0, 1), not {self.eval_fraction}")
        require(0 < self.t_min < self.t_max <= 1, f"0 < t_min < t_max <= 1 must hold, not t_min={self.t_min}, t_max={self.t_max}")
        require(
            not self.complementary or (self.views % 2 == 0 and self.schedule == "linear" and self.t_max == 1),
            f"complementary=true pairs the times t and 1 - t: it needs an even number of views, not {self.views}, "
            f"schedule=linear, not {self.schedule}, and t_max=1, not {self.t_max}",
        )
        require(self.lora_rank >= 0, f"lora_rank must be 0 (train all weights) or more, not {self.lora_rank}")
        require(self.lora_rank > 0 or not self.lora_targets, "lora_targets needs LoRA adapters: set lora_rank to 16, say")
        for name in ("epochs", "learning_rate", "max_grad_norm", "eval_every", "save_every", "lora_alpha"):
            require(getattr(self, name) > 0, f"{name} must be above 0, not {getattr(self, name)}")
        require(
            (self.prompt_field is None) == (self.response_field is None),
            f"prompt_field and response_field go together, not prompt_field={self.prompt_field}, response_field={self.response_field}",
        )


@dataclass(frozen=True)
class SampleConfig:
    """How text is generated, and from which prompts."""

    enabled: bool = True
    """Run this stage."""
    prompts: tuple[str, ...] = ("Tell me about the sea.", "Write a haiku about autumn.")
    """Prompts of the sample step."""
    chat: bool = True
    """Put each prompt through the tokenizer's chat template, as a user's message."""
    max_new_tokens: int = 128
    """The most tokens to generate after the prompt."""
    min_new_tokens: int = 0
    """No end-of-sequence token before this many new tokens."""
    steps_per_block: int | None = None
    """Network evaluations per block, each revealing the same number of tokens; None reveals one token at a time."""
    block_size: int | None = None
    """mdlm: fill the canvas in blocks of this many tokens, left to right; None is one block. bd3lm: the checkpoint's own."""
    block_origin: Literal["document_start", "prompt_end"] | None = None
    """bd3lm: blocks are counted from the first token or the prompt's end; None is the checkpoint's own (published ones: prompt_end)."""
    policy: Literal["confidence", "margin", "entropy", "random"] = "confidence"
    """What is revealed first: the highest probability, the widest margin between the two best tokens, the lowest entropy, or any."""
    threshold: float | None = None
    """Also reveal every token whose probability reaches this; at least one token per evaluation is revealed."""
    entropy_budget: float | None = None
    """Also reveal, in the policy's order, tokens whose entropies without the largest sum to at most this many nats (arXiv 2505.24857)."""
    remasking: float = 0.0
    """Share of a block's revealed tokens that each evaluation masks again, the least confident first (arXiv 2503.00307)."""
    guidance: float = 0.0
    """mdlm: w of classifier-free guidance, (1 + w) logits - w (logits with the prompt masked); each evaluation counts twice."""
    temperature: float = 0.0
    """0 is greedy; above it, tokens are drawn from softmax(logits / temperature)."""
    top_p: float = 1.0
    """Draw only among the most probable tokens that together have this probability."""
    top_k: int | None = None
    """Draw only among this many of the most probable tokens."""
    suppressed_tokens: tuple[int, ...] = ()
    """Ids of tokens that are never produced; the mask token never is."""
    stop: tuple[str, ...] = ()
    """Texts that end an answer, which is cut before them."""
    cache: Literal["exact", "prefix", "dual"] = "exact"
    """mdlm: `prefix` and `dual` are APPROXIMATE: what lies before (or around) a block is computed once per block (arXiv 2505.22618)."""
    batch_size: int = 32
    """Prompts to generate at once."""
    cuda_graph: bool = False
    """Pad to static shapes, and on CUDA replay each evaluation as a CUDA graph: for small models, whose time goes into kernel launches."""

    def __post_init__(self) -> None:
        _require_at_least(1, self, "max_new_tokens", "batch_size", "steps_per_block", "block_size", "top_k")
        _require_at_least(0, self, "temperature", "guidance", "min_new_tokens", "entropy_budget")
        require(self.threshold is None or 0 < self.threshold <= 1, f"threshold must lie in (0, 1], not {self.threshold}")
        require(0 < self.top_p <= 1, f"top_p must lie in (0, 1], not {self.top_p}")
        require(0 <= self.remasking < 1, f"remasking must lie in [0, 1), not {self.remasking}")
        require("" not in self.stop, "stop must not hold an empty text: it would end every answer at once")
        require(
            self.threshold is None or self.entropy_budget is None,
            f"threshold={self.threshold} and entropy_budget={self.entropy_budget} both say how many tokens to reveal: set one of them",
        )
        require(
            self.remasking == 0 or (self.steps_per_block is not None and self.threshold is self.entropy_budget is None),
            f"remasking={self.remasking} needs a fixed number of evaluations: set steps_per_block, but no threshold or entropy_budget",
        )
        require(
            self.guidance == 0 or self.cache == "exact",
            f"guidance={self.guidance} cannot go with cache={self.cache}: what is seen without the prompt is not cached. Set cache=exact",
        )


NOT_THE_ANSWER = ("enabled", "prompts", "batch_size", "cuda_graph")
"""Fields of `SampleConfig` that concern the stage or the machine: they do not change an answer."""


@dataclass(frozen=True)
class EvaluateConfig:
    """Which tasks and texts a checkpoint is scored on."""

    enabled: bool = True
    """Run this stage."""
    tasks: tuple[str, ...] = ("a2d_words",)
    """lm-evaluation-harness task or group names; `a2d_words` is the embedded set."""
    suite: str | None = None
    """A list of tasks with their own shots and samplers, instead of `tasks`: a name (see 'suites') or a .toml file."""
    frontier: tuple[str, ...] = ()
    """Run the tasks with further samplers too, such as threshold=0.5,0.9 or steps_per_block=1,2: quality against evaluations."""
    task_dirs: tuple[str, ...] = ()
    """Directories with more lm-eval task files."""
    datasets: dict[str, str] = field(default_factory=dict)
    """Task or group -> a directory with its data, SPLIT.jsonl (.json, .parquet, .csv), to use instead of the Hub's."""
    limit: int | None = None
    """Score only this many documents of each task."""
    num_fewshot: int | None = None
    """Examples before each question; None keeps the task's own number."""
    apply_chat_template: bool = True
    """Put each question through the tokenizer's chat template."""
    likelihood: Literal["nelbo", "exact"] = "nelbo"
    """Log-likelihood of an answer: minus the NELBO, by Monte Carlo, or exact for the reveal order `order` (arXiv 2603.01367)."""
    order: Literal["confidence", "entropy", "margin", "left_to_right"] = "confidence"
    """What the exact likelihood reveals next: the highest probability, the lowest entropy, the widest margin, or the first token."""
    max_nelbo_samples: int = 64
    """The most noise draws for answers that are still within the standard error of each other after `nelbo_samples`."""
    batch_tokens: int = 4096
    """Positions per forward pass when computing likelihoods."""
    batch_size: int = 128
    """Prompts, or rows of text, to compute at once."""
    baseline: bool = True
    """Score the converted but untrained model too, for comparison."""
    text_dataset: str | None = "embedded:corpus"
    """Held-out text for the NELBO per token, written like `dataset` of pretraining; None skips it."""
    text_part: Literal["held_out", "all"] = "held_out"
    """Score the held-out part of `text_dataset`, or all of it."""
    text_config: str | None = None
    """Configuration (subset) name of a Hub `text_dataset`."""
    text_split: str | None = None
    """Split with the held-out text; without one, `text_fraction` of the training split is held out, as in pretraining."""
    text_fraction: float = 0.05
    """Fraction of the training split that is held out if there is no `text_split`."""
    text_field: str | None = None
    """Column with the text of `text_dataset`; None takes the known data set's own, or `text`."""
    text_length: int = 128
    """Tokens per scored row of text."""
    text_rows: int = 128
    """Rows of text to score."""
    nelbo_samples: int = 8
    """Noise draws per row of the NELBO estimate."""
    code_execution: bool = False
    """Run the code that the model writes (HumanEval, MBPP), each program in its own process without a network."""
    code_isolation: Literal["namespaces", "process"] = "namespaces"
    """What contains such a program: Linux namespaces and limits, or (inside a container made for this) only limits."""

    def __post_init__(self) -> None:
        _require_at_least(1, self, "batch_size", "batch_tokens", "text_rows", "nelbo_samples", "max_nelbo_samples", "limit")
        _require_at_least(0, self, "num_fewshot")
        _require_at_least(2, self, "text_length")
        require(0 < self.text_fraction < 1, f"text_fraction must lie in (0, 1), not {self.text_fraction}")
        if self.text_dataset is not None:
            parse_sources(self.text_dataset)

    def reading(self) -> TrainConfig:
        """How the held-out text is read, in the terms of pretraining data."""
        return TrainConfig(
            dataset=str(self.text_dataset),
            dataset_config=self.text_config,
            eval_split=self.text_split,
            eval_fraction=self.text_fraction,
            text_field=self.text_field,
            max_length=self.text_length,
        )


@dataclass(frozen=True)
class RegisterConfig:
    """How the finished model enters the MLflow model registry."""

    enabled: bool = True
    """Run this stage."""
    name: str = "a2d-{preset}-{objective}"
    """Name of the registered model."""


@dataclass(frozen=True)
class TrackingConfig:
    """Where MLflow lives."""

    uri: str | None = None
    """MLflow tracking URI; None takes MLFLOW_TRACKING_URI, or else a local SQLite database."""
    experiment: str = "a2d"
    """MLflow experiment."""


@dataclass(frozen=True)
class Toleration:
    """A taint of a Kubernetes node that a pod tolerates: spot nodes have one, and often GPU nodes."""

    key: str
    """Key of the taint."""
    operator: Literal["Exists", "Equal"] = "Exists"
    """Tolerate any value, or only `value`."""
    value: str | None = None
    """Value of the taint, with Equal."""
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None
    """Effect of the taint; None tolerates all of them."""

    def __post_init__(self) -> None:
        require(
            (self.value is not None) == (self.operator == "Equal"),
            f"toleration of {self.key}: operator={self.operator} with value={self.value!r}: Equal needs a value, and Exists has none",
        )


@dataclass(frozen=True)
class StepCompute:
    """What one step of the flow asks of the machine it runs on."""

    gpu: int = 0
    """GPUs."""
    cpu: int = 1
    """CPU cores."""
    memory_mb: int = 4096
    """Memory in MiB."""
    shared_memory_mb: int | None = None
    """Shared memory in MiB, which data loaders and NCCL use; None takes the platform's default."""
    disk_mb: int | None = None
    """Disk in MiB, for checkpoints; None takes the platform's default. On AWS Batch the queue's machines decide."""
    image: str | None = None
    """Container image of this step, if it is not the profile's."""
    queue: str | None = None
    """AWS Batch job queue of this step, if it is not the profile's: one without GPUs, for instance, or with spot machines."""
    node_selector: dict[str, str] | None = None
    """Kubernetes node labels of this step, instead of the profile's."""
    tolerations: tuple[Toleration, ...] | None = None
    """Kubernetes taints that this step tolerates, instead of the profile's."""
    secrets: tuple[str, ...] | None = None
    """Secrets of this step, instead of the profile's."""
    nodes: int = 1
    """Machines that train together, each with these resources; only training takes several."""
    meeting_minutes: int = 10
    """How long a node waits for the others to start."""
    processes: int = 1
    """Training processes on the node: one per GPU."""
    strategy: str = "ddp"
    """How the processes share the training: ddp, fsdp2, zero2, or the path of an accelerate configuration."""
    retries: int = 0
    """How often a failed step is retried."""
    minutes_between_retries: int = 2
    """Pause before a retry."""
    timeout_minutes: int = 60
    """Time limit of the step."""

    def __post_init__(self) -> None:
        _require_at_least(1, self, "nodes", "meeting_minutes", "cpu", "memory_mb", "processes", "timeout_minutes", prefix="compute ")
        _require_at_least(0, self, "gpu", "retries", "minutes_between_retries", prefix="compute ")
        require(
            self.gpu == 0 or self.processes <= self.gpu,
            f"compute asks for {self.processes} processes on {self.gpu} GPUs: give each process a GPU of its own",
        )
        check_strategy(self.strategy)


@dataclass(frozen=True)
class ComputeConfig:
    """The compute profile: where the steps run, and with what."""

    platform: Literal["local", "kubernetes", "batch"] = "local"
    """Run steps on this machine, on Kubernetes, or on AWS Batch."""
    image: str | None = None
    """Container image of remote steps."""
    namespace: str | None = None
    """Kubernetes namespace."""
    service_account: str | None = None
    """Kubernetes service account."""
    node_selector: dict[str, str] = field(default_factory=dict)
    """Kubernetes node labels that a GPU step needs."""
    tolerations: tuple[Toleration, ...] = ()
    """Kubernetes taints that a GPU step tolerates: `[{ key = "spot" }]`. Give steps on spot nodes retries."""
    queue: str | None = None
    """AWS Batch job queue."""
    secrets: tuple[str, ...] = ()
    """Names of secrets that become environment variables, such as one with HF_TOKEN: of Kubernetes, or of AWS Secrets Manager on Batch."""
    convert: StepCompute = StepCompute()
    """Resources of the convert step."""
    train: StepCompute = StepCompute()
    """Resources of the pretrain and sft steps."""
    generate: StepCompute = StepCompute()
    """Resources of the sample and evaluate steps."""
    register: StepCompute = StepCompute()
    """Resources of the register step."""

    def __post_init__(self) -> None:
        require(
            self.platform == "local" or bool(self.image) or self.platform == "batch",
            f"compute.platform={self.platform} needs compute.image: the container image with a2d_core installed",
        )
        for name in ("convert", "generate", "register"):
            nodes = getattr(self, name).nodes
            require(nodes == 1, f"compute.{name}.nodes={nodes}: only training runs on several nodes, by compute.train.nodes")


@dataclass(frozen=True)
class Recipe:
    """Everything that one run of the pipeline needs to know."""

    name: str
    """Name of the preset it came from."""
    objective: str
    """mdlm (masked diffusion) or bd3lm (block diffusion)."""
    seed: int = 0
    """Seed of everything random."""
    convert: ConvertConfig = ConvertConfig()
    pretrain: TrainConfig = TrainConfig()
    sft: TrainConfig = TrainConfig(dataset="embedded:tasks")
    sample: SampleConfig = SampleConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    register: RegisterConfig = RegisterConfig()
    compute: ComputeConfig = ComputeConfig()
    tracking: TrackingConfig = TrackingConfig()

    def __post_init__(self) -> None:
        check_objective(self.objective)
        _require_at_least(0, self, "seed")
        require(
            not (self.objective == "bd3lm" and self.convert.right_shift),
            "convert.right_shift=true does not fit bd3lm: a block's first token would be read from a noised block in "
            "training and from a clean one in sampling; use --objective mdlm, or leave the shift out",
        )
        require(
            not (self.objective == "mdlm" and self.sft.enabled and self.sft.pack),
            "sft.pack=true does not fit mdlm, which fills each answer to the longest row and leaves nothing to pack: leave it out",
        )
        self._check_text_is_held_out()
        if self.objective == "bd3lm":
            for stage in ("pretrain", "sft"):
                length = getattr(self, stage).max_length
                require(
                    not getattr(self, stage).enabled or length % self.convert.block_size == 0,
                    f"{stage}.max_length={length} is not a multiple of convert.block_size={self.convert.block_size}: "
                    f"use {max(1, length // self.convert.block_size) * self.convert.block_size}",
                )

    def _check_text_is_held_out(self) -> None:
        """The text that is scored must not have been trained on."""
        trained, scored = self.pretrain, self.evaluate
        if not (trained.enabled and scored.enabled and scored.text_dataset):
            return
        ours, theirs = ({(s.ref, s.config, s.split, s.filters) for s in parse_sources(d)} for d in (scored.text_dataset, trained.dataset))
        shared = {ref for ref, *_ in ours} & {ref for ref, *_ in theirs}
        if not shared:
            return
        name = ", ".join(sorted(shared))
        require(
            scored.text_part == "held_out",
            f"evaluate.text_part=all scores all of '{name}', which pretrain.dataset trains on: give another evaluate.text_dataset",
        )
        require(
            {source for source in ours if source[0] in shared} <= theirs,
            f"evaluate.text_dataset reads '{name}' with another config, split or filter than pretrain.dataset: "
            "give both the same, or evaluate would score text that was trained on",
        )
        require(
            not trained.streaming or trained.eval_split is not None,
            f"pretrain streams '{name}', which evaluate.text_dataset names too: name a pretrain.eval_split and evaluate.text_split, "
            "or another evaluate.text_dataset, or evaluate would score text that was trained on",
        )
        for name, our, their in (
            ("dataset_config", scored.text_config, trained.dataset_config),
            ("eval_split", scored.text_split, trained.eval_split),
            ("eval_fraction", scored.text_fraction, trained.eval_fraction),
        ):
            require(
                our == their,
                f"evaluate.text_{name.removeprefix('eval_').removeprefix('dataset_')}={our} differs from pretrain.{name}={their}: "
                "give both the same value, or evaluate would score text that was trained on",
            )


STAGES = ("convert", "pretrain", "sft", "sample", "evaluate", "register")
