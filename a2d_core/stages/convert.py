"""Convert: an autoregressive checkpoint becomes a diffusion checkpoint with the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from a2d_core import checkpoints, conversion, embedded
from a2d_core.config import ConvertConfig, check_objective, require


def run(config: ConvertConfig, objective: str, output_dir: str | Path, *, seed: int = 0) -> dict[str, Any]:
    """Write a diffusion checkpoint to `output_dir`, proved before it is saved; return what it is.

    `config.model` = `embedded` (or `embedded:SIZE`) trains the embedded autoregressive model first, once per machine. Raises
    `UserError` where the model cannot be converted, or not for that objective.
    """
    check_objective(objective)
    require(not (objective == "bd3lm" and config.right_shift), "right_shift=true does not fit bd3lm: use objective mdlm, or leave it out")
    source = config.model
    if source.split(":")[0] == "embedded":
        source = str(embedded.build_base(source.partition(":")[2] or "tiny"))
    model = conversion.convert(config, objective, source, output_dir, seed=seed)
    return {
        "architecture": type(model.network).__name__,
        "parameters": sum(p.numel() for p in model.network.parameters()),
        "vocab_size": model.network.get_input_embeddings().weight.shape[0],
        "mask_token_id": model.spec.mask_token_id,
        "block_size": model.objective.block_size,
        "source": source,
        "weights_sha256": checkpoints.digest(output_dir),
    }
