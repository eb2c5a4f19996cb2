"""What a stage looks at before it starts to work, and what it says when the memory is full.

All of it is quick and needs no torch, so that a mistake shows within a second.
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from a2d_core import checkpoints, published
from a2d_core.config import TrainConfig, UserError, require

MADE_HERE = ("checkpoint-*", "metrics.jsonl", "samples.jsonl", "results.json")
"""Files by which the output of a stage is known, and may be replaced; a converted model is known by its `a2d` entry."""
STATE_BYTES_PER_PARAMETER = 12
"""A training checkpoint: float32 weights and AdamW's two moments."""
FINAL_BYTES_PER_PARAMETER = 4
BESIDES = 2
"""Training checkpoints beside the newest that are kept: the best, and one that goes when the next is whole."""


class MemoryFullError(RuntimeError):
    """The device's memory was full; the message names the fields to lower."""


def output_directory(path: str | Path, *, resume: bool = False, overwrite: bool = False, inputs: tuple[str | Path, ...] = ()) -> Path:
    """Make the output directory ready, and return it.

    Raises `UserError` where it cannot be written, or is not empty without `resume` or `overwrite`; `overwrite` empties it, if
    it holds the output of an earlier stage and none of `inputs`.
    """
    path = Path(path)
    try:
        return _made_ready(path, resume, overwrite, inputs)
    except OSError as error:
        raise UserError(f"cannot write to output directory '{path}' ({error.strerror}): choose another, or mend its permissions") from None


def _made_ready(path: Path, resume: bool, overwrite: bool, inputs: tuple[str | Path, ...]) -> Path:
    require(not path.exists() or path.is_dir(), f"output directory '{path}' is a file: choose another")
    if path.is_dir() and any(path.iterdir()) and not resume:
        require(overwrite, f"output directory '{path}' is not empty: choose another, or replace what is in it with --overwrite")
        inside = [str(i) for i in inputs if Path(i).exists() and Path(i).resolve().is_relative_to(path.resolve())]
        require(not inside, f"--overwrite would delete '{path}' with the input {', '.join(inside)} in it: choose another output directory")
        is_ours = (read_spec(path) or {}).get("objective") or any(next(path.glob(name), None) for name in MADE_HERE)
        require(
            bool(is_ours), f"'{path}' does not look like the output of a stage, so it is not deleted: empty it yourself, or choose another"
        )
        shutil.rmtree(path)
    path.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=path):
        return path


def read_spec(model_dir: str | Path) -> dict[str, Any] | None:
    """The `a2d` entry of a checkpoint directory's config.json; None where there is none.

    A published checkpoint (`published`) has none and still is one: its objective is None. Raises `UserError` for a damaged file.
    """
    path = Path(model_dir) / "config.json"
    try:
        return published.entry(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None
    except (ValueError, AttributeError):
        raise UserError(f"{path} is not the JSON of a Hugging Face model: the file is damaged") from None


def room_for_checkpoints(config: TrainConfig, model_dir: str | Path, output_dir: str | Path) -> None:
    """Raise `UserError` where the disk of `output_dir` has no room for the checkpoints that the training will keep."""
    count = parameters(model_dir)
    needed = disk_bytes(config, count, parameters(model_dir, config.lora_rank) if config.lora_rank else count)
    there = next(folder for folder in (Path(output_dir).absolute(), *Path(output_dir).absolute().parents) if folder.exists())
    free = shutil.disk_usage(there).free
    require(
        needed <= free,
        f"too little disk at '{output_dir}': {config.keep_checkpoints + BESIDES} training checkpoints and the final one of a model with "
        f"{count / 1e6:.1f} million parameters need about {needed / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free: "
        "lower keep_checkpoints, free some space, or choose another output directory",
    )


def disk_bytes(config: TrainConfig, count: int, trained: int) -> int:
    """Bytes of the checkpoints that a training keeps at once, of a model with `count` parameters of which so many are trained."""
    return trained * STATE_BYTES_PER_PARAMETER * (config.keep_checkpoints + BESIDES) + count * FINAL_BYTES_PER_PARAMETER


def parameters(model_dir: str | Path, lora_rank: int | None = None) -> int:
    """Parameters of a checkpoint directory, counted in the headers of its safetensors files; 0 where there are none.

    With `lora_rank`: at most those of adapters of that rank on every matrix.
    """
    count = 0
    for path in Path(model_dir).glob("*.safetensors"):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        shapes = [entry["shape"] for name, entry in header.items() if name != "__metadata__"]
        count += sum(math.prod(s) if lora_rank is None else math.prod(s[:-2]) * lora_rank * sum(s[-2:]) for s in shapes)
    return count


def newest_checkpoint(output_dir: str | Path, *, required: bool = True) -> str | None:
    """The newest whole `checkpoint-N` of an interrupted training; where there is none, None, or `UserError` if it is required."""
    damaged: list[str] = []
    newest = checkpoints.newest(Path(output_dir), say=damaged.append)
    print(*damaged, sep="\n", end="\n" * bool(damaged))
    require(newest is not None or not required, f"'{output_dir}' holds no checkpoint to resume from: start without --resume")
    return str(newest) if newest else None


@contextmanager
def memory_advice(stage: str, config: Any) -> Iterator[None]:
    """Raise an out-of-memory error of the body, in this process or in a worker, as a `MemoryFullError` that names the fields to lower."""
    try:
        yield
    except RuntimeError as error:
        kind = getattr(error, "kind", type(error).__name__)
        if kind != "OutOfMemoryError" and "CUDA error: out of memory" not in str(error):
            raise
        if isinstance(config, TrainConfig):
            advice = (
                f"lower {stage}.batch_size={config.batch_size} and raise {stage}.gradient_accumulation_steps="
                f"{config.gradient_accumulation_steps} by the same factor (the training stays the same), lower {stage}.max_length="
                f"{config.max_length} or {stage}.views={config.views}, or set {stage}.gradient_checkpointing=true"
            )
            if config.precision == "float32":
                advice += f" and {stage}.precision=bfloat16"
        elif hasattr(config, "batch_size"):
            advice = f"lower {stage}.batch_size={config.batch_size} or sample.max_new_tokens"
        else:
            advice = "the model itself does not fit: take a smaller one, or a device with more memory"
        raise MemoryFullError(f"CUDA ran out of memory in {stage}: {advice}") from error
