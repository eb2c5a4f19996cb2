"""What a recipe would cost, and what it would register, told within seconds, without weights and without a network.

Training is counted, as matrix products: 2 FLOPs a weight and token, attention for the pairs that see each other, the head at
masked positions, and the backward pass as two forward passes. Everything that is assumed is printed with the result.
"""

# L positions of a row, K noised views

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from a2d_core.config import Recipe, Source, TrainConfig, parse_sources
from a2d_core.review import aligned
from a2d_core.stages import checks, register

GIB = 2.0**30
PEAKS = {"A100": (312e12, 19.5e12), "H100": (989e12, 67e12), "H200": (989e12, 67e12), "L40S": (362e12, 91.6e12), "L4": (121e12, 30.3e12)}
"""GPU -> FLOP/s of dense bfloat16 and of float32 products, from NVIDIA's data sheets (SXM where there are several)."""
SHOWN = ("A100", "H100", "H200")
"""GPUs that a plan shows where `compute.node_selector` names none."""
MFU = 0.35
"""Share of a GPU's peak that training reaches (assumed)."""
CORE_FLOPS = 50e9
"""FLOP/s that one CPU core sustains (assumed; the tiny recipe on an AVX-512 core reaches about that)."""
BYTES_PER_TOKEN = 4.0
"""Bytes of text per token of a subword vocabulary (assumed); a byte-level one has 1."""
LOGITS_BYTES = 4 * 3 * (1 << 24)
"""Logits that the loss holds at once, with their gradient and a copy."""


@dataclass(frozen=True)
class Shape:
    """What the cost of a network depends on."""

    parameters: int
    vocabulary: int
    hidden: int
    layers: int
    attention: int
    """Heads x their dimension."""
    intermediate: int
    stored_bytes: int
    """Bytes per weight on disk."""
    is_tied: bool = True

    @property
    def inside(self) -> int:
        """Parameters without the embeddings."""
        return self.parameters - self.vocabulary * self.hidden * (1 if self.is_tied else 2)


TINY = Shape(1_066_688, 261, 128, 3, 128, 768, stored_bytes=4)
SHAPES = {
    "embedded": TINY,
    "embedded:tiny": TINY,
    "embedded:smoke": Shape(90_880, 261, 64, 2, 64, 128, stored_bytes=4),
    "Qwen/Qwen3-0.6B": Shape(596_049_920, 151_936, 1024, 28, 2048, 3072, stored_bytes=2),
    "Qwen/Qwen2.5-Coder-0.5B-Instruct": Shape(494_032_768, 151_936, 896, 24, 896, 4864, stored_bytes=2),
}
"""Models that need no look."""


@dataclass(frozen=True)
class Known:
    """The size of a public data set's training part."""

    source: str
    """Where the number comes from."""
    rows: int
    tokens: int | None = None
    """Of a text, for a subword vocabulary of some 50,000."""
    is_whole: bool = True
    """There is a test part beside it, or none is counted: nothing more is held out of it."""


KNOWN = {
    "embedded:corpus": Known("counted; it differs a little between versions of Python", rows=123, tokens=1_089_399),
    "embedded:tasks": Known("at most 50,000, made here", rows=50_000),
    "tiny-shakespeare": Known("1,224,242 bytes in 472 rows, which overlap, by its dataset_info; 3.3 a GPT-2 token", 472, 368_000),
    "openwebtext": Known("9.04e9 GPT-2 tokens in 8,013,769 documents, as nanoGPT counts them", 8_013_769, 9_035_582_198, is_whole=False),
    "alpaca": Known("52,002 rows, by its data card", rows=52_002, is_whole=False),
    "tulu-3-sft-mixture": Known("939,343 rows, by its data card", rows=939_343, is_whole=False),
    "smoltalk": Known("about 1.04e6 rows, by its data card", rows=1_040_000),
    "opc-sft-stage1": Known("about 4.2e6 rows, by its viewer on the Hub", rows=4_216_000, is_whole=False),
    "opc-sft-stage2": Known("about 436,000 rows, by its viewer on the Hub", rows=436_000, is_whole=False),
    "gsm8k": Known("7,473 rows, by its data card", rows=7_473),
}
"""Data sets by their names without the owner."""


def estimate(recipe: Recipe) -> dict[str, Any]:
    """The cost of a recipe as plain values; what could not be found out is None, and `missing` says why."""
    shape, origin = find_shape(recipe.convert.model, recipe.convert.revision)
    missing = [] if shape else [origin]
    stages = {}
    for name in ("pretrain", "sft"):
        config: TrainConfig = getattr(recipe, name)
        if config.enabled:
            stages[name], unknown = _stage(config, name, recipe, shape)
            missing += unknown
    flops = [stage["flops"] for stage in stages.values()]
    return {
        "model": {"name": recipe.convert.model, "parameters": shape and shape.parameters, "from": origin if shape else None},
        "stages": stages,
        "hours": _hours(recipe, stages) if None not in flops else [],
        "register": _registration(recipe, shape) if recipe.register.enabled else None,
        "missing": missing,
    }


# --- the model ------------------------------------------------------------------------------------


def find_shape(model: str, revision: str | None = None) -> tuple[Shape | None, str]:
    """The shape of a model and where it was found, or None and what is missing.

    A directory or a cached Hub model is built from its configuration, without weights.
    """
    if model in SHAPES:
        return SHAPES[model], "the table in a2d_core.plan"
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(model, revision=revision, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        return None, f"the size of '{model}', which is neither a directory here nor in the Hub's cache ({str(error).splitlines()[0]})"
    with torch.device("meta"):
        network = AutoModelForCausalLM.from_config(config)
    text = config.get_text_config()
    heads = text.num_attention_heads
    shape = Shape(
        parameters=sum(weight.numel() for weight in network.parameters()),
        vocabulary=text.vocab_size,
        hidden=text.hidden_size,
        layers=text.num_hidden_layers,
        attention=heads * (getattr(text, "head_dim", None) or text.hidden_size // heads),
        intermediate=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
        stored_bytes=(config.dtype or torch.float32).itemsize,
        is_tied=bool(config.tie_word_embeddings),
    )
    return shape, "its configuration"


# --- the data -------------------------------------------------------------------------------------


def count_rows(config: TrainConfig, is_text: bool, bytes_per_token: float) -> tuple[int | None, list[str]]:
    """Training rows of a stage, and where the numbers come from; None, and what is missing, where one is not known."""
    total, sources = 0.0, []
    for source in parse_sources(config.dataset):
        rows, origin = _source_rows(source, config, is_text, bytes_per_token)
        if rows is None:
            return None, [f"the number of rows of '{source.ref}' ({origin}): set max_steps, or give a local copy"]
        total += rows
        sources.append(f"{source.ref}: {origin}" + (", filters not counted" if source.filters else ""))
    return int(total), sources


def _source_rows(source: Source, config: TrainConfig, is_text: bool, bytes_per_token: float) -> tuple[float | None, str]:
    path = Path(source.ref).expanduser()
    known = _measured(path, bytes_per_token) if path.exists() else KNOWN.get(source.ref) or KNOWN.get(path.name)
    if known is None:
        return None, "it is not here, and not in the table of known data sets"
    share = 1.0 if known.is_whole or config.eval_split else 1 - config.eval_fraction
    documents = known.rows * share if source.train is None else source.train
    if not is_text:
        return documents, known.source
    return known.tokens and known.tokens * documents / known.rows / config.max_length, known.source


def _measured(path: Path, bytes_per_token: float) -> Known | None:
    """The lines of a file or a directory of files, and their tokens; None where it holds none that can be counted."""
    rows, size, files = 0, 0, sorted(path.rglob("*")) if path.is_dir() else [path]
    for file in (file for file in files if file.suffix in (".txt", ".jsonl", ".json", ".csv", ".parquet")):
        if file.suffix == ".parquet":
            from pyarrow import parquet

            found = parquet.read_metadata(file)
            rows, size = rows + found.num_rows, size + sum(found.row_group(i).total_byte_size for i in range(found.num_row_groups))
            continue
        with file.open("rb") as lines:
            count = 1 if file.suffix == ".txt" else sum(1 for line in lines if line.strip())
        rows, size = rows + count, size + file.stat().st_size
    return Known(f"{rows:,} lines, {size:,} bytes", rows, int(size / bytes_per_token), is_whole=False) if rows else None


# --- a stage --------------------------------------------------------------------------------------


def _stage(config: TrainConfig, name: str, recipe: Recipe, shape: Shape | None) -> tuple[dict[str, Any], list[str]]:
    """Rows, steps, tokens, FLOPs and memory of one training stage, and what is missing."""
    is_byte_level = recipe.convert.model.split(":")[0] == "embedded"
    rows, origins = count_rows(config, name == "pretrain", 1.0 if is_byte_level else BYTES_PER_TOKEN)
    processes = recipe.compute.train.processes * recipe.compute.train.nodes
    per_step = config.batch_size * config.gradient_accumulation_steps * processes
    steps = config.max_steps if config.max_steps > 0 else rows and math.ceil(config.epochs * math.ceil(rows / per_step))
    seen = steps and steps * per_step
    block = recipe.convert.block_size if recipe.objective == "bd3lm" else config.max_length
    stage = {
        "rows": rows,
        "rows_from": origins if rows is not None else [],
        "steps": steps,
        "tokens": seen and seen * config.max_length,
        "flops": seen and shape and seen * row_flops(shape, config, block),
        "memory_gib": shape and memory(shape, config, block, processes, recipe.compute.train.strategy) / GIB,
        "disk_gib": shape and checks.disk_bytes(config, shape.parameters, shape.parameters) / GIB,
    }
    return stage, [] if steps else origins


def slots(config: TrainConfig, block: int) -> tuple[int, int]:
    """Positions that the network computes for one row, and (query, key) pairs that see each other.

    [clean | K noised copies]: the clean copy ends before the last block, and a noised block sees itself and the clean
    blocks before it. Where the row is one block there is no clean copy.
    """
    blocks, views = config.max_length // block, config.views
    positions = (blocks - 1) * block + views * config.max_length
    pairs = block * block * (blocks * (blocks - 1) // 2 + views * blocks * (blocks + 1) // 2)
    return positions, pairs


def row_flops(shape: Shape, config: TrainConfig, block: int) -> float:
    """FLOPs of one row, forward and backward."""
    positions, pairs = slots(config, block)
    scored = config.views * config.max_length * masked_share(config)
    body = 2 * shape.inside * positions + 4 * shape.layers * shape.attention * pairs
    return (4 if config.gradient_checkpointing else 3) * body + 3 * 2 * shape.vocabulary * shape.hidden * scored


def masked_share(config: TrainConfig) -> float:
    """The mean of 1 - alpha(t) over the times that are drawn."""
    if config.schedule == "linear":
        return (config.t_min + config.t_max) / 2
    upper, lower = (math.sin(math.pi / 2 * (1 - t)) for t in (config.t_min, config.t_max))
    return 2 / math.pi * (upper - lower) / (config.t_max - config.t_min)


def memory(shape: Shape, config: TrainConfig, block: int, processes: int, strategy: str = "ddp") -> float:
    """Bytes that one process needs: weights, gradients, AdamW's moments, activations, logits."""
    is_half = config.precision != "float32"
    whole, shared = 16 + (2 if is_half else 0) + (4 if processes > 1 else 0), 0  # a bfloat16 copy of the weights; the buckets of DDP
    if strategy == "zero2":
        whole, shared = (2, 14) if is_half else (4, 12)  # the float32 weights belong to the optimizer's state
    if strategy == "fsdp2":
        whole, shared = 0, 16
    state = whole + shared / processes
    per_layer = 8 * shape.hidden + 6 * shape.attention + 4 * shape.intermediate
    kept = shape.hidden * shape.layers + per_layer if config.gradient_checkpointing else per_layer * shape.layers
    positions = slots(config, block)[0] * config.batch_size
    return shape.parameters * state + positions * kept * (2 if is_half else 4) + min(LOGITS_BYTES, 12 * positions * shape.vocabulary)


# --- the whole ------------------------------------------------------------------------------------


def _hours(recipe: Recipe, stages: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Hours of training on the hardware of the recipe's profile, on each GPU that it may mean."""
    train = recipe.compute.train
    if train.gpu == 0:
        seconds = sum(stage["flops"] for stage in stages.values()) / (CORE_FLOPS * train.cpu)
        return [{"hardware": f"{train.cpu} CPU cores", "hours": seconds / 3600, "gpu_hours": 0.0}]
    label = " ".join(recipe.compute.node_selector.values()).upper()
    named = [max((gpu for gpu in PEAKS if gpu in label), key=len)] if any(gpu in label for gpu in PEAKS) else SHOWN
    rows = []
    for gpu in named:
        seconds = sum(
            stage["flops"] / (PEAKS[gpu][getattr(recipe, name).precision == "float32"] * MFU * train.processes * train.nodes)
            for name, stage in stages.items()
        )
        hardware = f"{train.processes * train.nodes} x {gpu}"
        rows.append({"hardware": hardware, "hours": seconds / 3600, "gpu_hours": seconds / 3600 * train.gpu * train.nodes})
    return rows


def _registration(recipe: Recipe, shape: Shape | None) -> dict[str, Any]:
    evaluate = recipe.evaluate
    tasks = [f"the suite {evaluate.suite}"] if evaluate.suite else [*evaluate.tasks]
    text = [f"the NELBO of {evaluate.text_dataset}"] if evaluate.text_dataset else []
    sizes = {"auto": shape and shape.stored_bytes, "float32": 4}
    stored = sizes.get(recipe.convert.dtype, 2)
    return {
        "name": register.model_name(recipe),
        "alias": "candidate",
        "review": "pending",
        "gate": tasks + text if evaluate.enabled else [],
        "weights_gib": shape and stored and shape.parameters * stored / GIB,
    }


def text(cost: dict[str, Any]) -> str:
    """A cost for the terminal."""
    model, stages = cost["model"], cost["stages"]
    size = "of unknown size" if model["parameters"] is None else f"{model['parameters']:,} parameters (from {model['from']})"
    head = ["stage", "rows", "steps", "tokens", "FLOPs", "memory", "disk"]
    counts, sizes = ("rows", "steps", "tokens", "flops"), ("memory_gib", "disk_gib")
    rows = [[name, *(_number(s[of]) for of in counts), *(_gib(s[of]) for of in sizes)] for name, s in stages.items()]
    lines = [f"model     {model['name']}, {size}", "", *(aligned([head, *rows]) if rows else ["nothing is trained"])]
    hours = [[h["hardware"], f"{h['hours']:.3g}", f"{h['gpu_hours']:.3g}"] for h in cost["hours"]]
    lines += ["", *aligned([["training on", "hours", "GPU-hours"], *hours])]
    if made := cost["register"]:
        gate = ", ".join(made["gate"]) or "nothing, because evaluate is switched off"
        lines += ["", f"registers {made['name']}, alias {made['alias']}, review {made['review']}, {_gib(made['weights_gib'])} of weights"]
        lines += [f"          its gate compares {gate} with the champion's"]
    lines += ["", "assumed", *(f"  {line}" for line in assumptions(cost))]
    if cost["missing"]:
        lines += ["", "missing", *(f"  {line}" for line in cost["missing"])]
    return "\n".join(lines)


def assumptions(cost: dict[str, Any]) -> Iterable[str]:
    """What the numbers rest on."""
    yield "rows of full length, all of it maskable: for sft, whose rows are as long as their conversation, an upper bound"
    yield "training alone is counted, without its evaluations, and without sampling, evaluate and data preparation"
    if not cost["stages"]:
        return
    if any(hour["gpu_hours"] for hour in cost["hours"]):
        peaks = ", ".join(f"{gpu} {PEAKS[gpu][0] / 1e12:.0f} TFLOP/s in bfloat16" for gpu in SHOWN)
        yield f"{MFU:.0%} of the peak of a data sheet: {peaks}"
    else:
        yield f"{CORE_FLOPS / 1e9:.0f} GFLOP/s a CPU core"
    yield "memory of one process: weights, gradients and AdamW's moments (its part of what the strategy shares out), all activations of "
    yield "  a micro-batch, a chunk of logits"
    for name, stage in cost["stages"].items():
        yield from (f"{name} rows of {origin}" for origin in stage["rows_from"])


def _number(value: float | None) -> str:
    return "?" if value is None else f"{value:,}" if value < 1e6 else f"{value:.3g}"


def _gib(value: float | None) -> str:
    return "?" if value is None else f"{value:.1f} GiB" if value >= 0.1 else f"{value * 1024:.0f} MiB"
