"""Sample: answer a fixed set of prompts, and tell at what cost."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch

from a2d_core import models, sampling
from a2d_core.config import SampleConfig


def run(
    config: SampleConfig, model_dir: str | Path, output_dir: str | Path, *, seed: int = 0, objective: str | None = None
) -> dict[str, Any]:
    """Answer `config.prompts` and write `samples.jsonl` below `output_dir`.

    Each sample has its prompt, completion, `nfe` (network evaluations), `new_tokens`, and `tokens_per_second` of its batch.
    `objective`: needed where the checkpoint does not say it.
    """
    model = models.load(model_dir, objective=objective)
    prompts = [model.encode(prompt, chat=config.chat) for prompt in config.prompts]
    generator = torch.Generator(model.device).manual_seed(seed)
    started = time.perf_counter()
    generations = sampling.generate(model, prompts, config, generator=generator)
    seconds = time.perf_counter() - started
    total = sum(len(generation.tokens) for generation in generations)
    samples = [
        {
            "prompt": prompt,
            "completion": model.tokenizer.decode(generation.tokens, skip_special_tokens=True),
            "nfe": generation.nfe,
            "new_tokens": len(generation.tokens),
            "tokens_per_second": total / seconds,
        }
        for prompt, generation in zip(config.prompts, generations, strict=True)
    ]
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    (output_dir / "samples.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    evaluations = sum(generation.nfe for generation in generations)
    return {
        "samples": samples,
        "tokens_per_evaluation": total / max(1, evaluations),
        "tokens_per_second": total / seconds,
        "seconds": seconds,
    }
