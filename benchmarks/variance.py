"""How much the noise of training disturbs the loss and its gradient, for each way of drawing diffusion times.

    python benchmarks/variance.py [--quick] [--checkpoint DIR]

The weights are frozen: those of the preset `tiny`, pretrained with bd3lm (or a checkpoint of yours), with blocks of 32 in rows
of 512 tokens of held-out text. Every method scores the same rows again and again, with fresh noise. The table compares the
variances of the loss (nats per token) and of its gradient (summed over all weights, through a random sketch of 4,096 numbers),
with 95% bootstrap intervals; methods with two views are compared with two plain views. Below it is the cross-entropy at each t.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Any

import shared
import torch

from a2d_core import models, noise, perplexity, trainer
from a2d_core.config import EvaluateConfig, TrainConfig

BLOCK, LENGTH, ROWS, SKETCH = 32, 512, 2, 4096
METHODS = {
    "per_sequence": {"t_draws": "per_sequence"},
    "iid": {"t_draws": "iid"},
    "stratified (default)": {"t_draws": "stratified"},
    "stratified, 2 views": {"t_draws": "stratified", "views": 2},
    "complementary, 2 views": {"t_draws": "stratified", "views": 2, "complementary": True},
}


def draw(model: models.DiffusionModel, config: TrainConfig, rows_BL: torch.Tensor, step: int) -> tuple[float, Any, torch.Tensor]:
    """One draw of the training loss: its value, its layout, and its cross-entropies. The gradient is left in the weights."""
    streams, row_B = model.objective.streams(rows_BL, torch.ones_like(rows_BL)), torch.arange(len(rows_BL))
    t, is_masked = trainer.corrupt(
        config, 0, step, row_B, streams.chunk_BT, streams.is_maskable_BT, total_rows=len(row_B), chunks=streams.chunks
    )
    layout = model.objective.layout(streams, is_masked, noise.nelbo_weight(t))
    model.zero_grad(set_to_none=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=models.multiplies_bfloat16()):
        total, ce = model(layout)
    loss = total / (config.views * rows_BL.numel())
    loss.backward()
    return loss.item(), layout, ce


def sketch(model: models.DiffusionModel, bucket: torch.Tensor, sign: torch.Tensor) -> torch.Tensor:
    """A random linear image of the gradient: its squared length is right in expectation."""
    gradient = torch.cat([weight.grad.flatten() for weight in model.parameters()])
    return torch.zeros(SKETCH).index_add(0, bucket, gradient * sign)


def variance(samples_DX: torch.Tensor) -> float:
    """Variance of a vector: summed over its entries."""
    return float(samples_DX.var(0).sum())


def ratio(base_DX: torch.Tensor, other_DX: torch.Tensor, resamples: int = 1000) -> tuple[float, float, float]:
    """variance(base) / variance(other) with its 95% bootstrap interval."""
    generator = torch.Generator().manual_seed(0)

    def resampled(samples_DX: torch.Tensor) -> torch.Tensor:
        draws = len(samples_DX)
        index = torch.randint(draws, (resamples, draws), generator=generator)
        counts = torch.zeros(resamples, draws).scatter_add_(1, index, torch.ones(resamples, draws)) / draws
        mean_square = counts @ samples_DX.square().sum(1)
        return mean_square - (counts @ samples_DX).square().sum(1)

    low, high = (resampled(base_DX) / resampled(other_DX)).quantile(torch.tensor([0.025, 0.975])).tolist()
    return variance(base_DX) / variance(other_DX), low, high


def plot(means: list[torch.Tensor]) -> Any:
    """The cross-entropy at each t."""
    figure, (axes,) = shared.figure(5, 3.2)
    axes.plot([(i + 0.5) / 10 for i in range(10)], means, marker="o", markersize=4)
    axes.set_xlabel("diffusion time t: the share of tokens that are masked")
    axes.set_ylabel("cross-entropy, nats per masked token")
    return figure


def main() -> None:
    parser = shared.parser(__doc__, "60 draws instead of 500")
    parser.add_argument("--checkpoint", help="a bd3lm checkpoint in place of the pretrained tiny model")
    options = parser.parse_args()
    draws = 60 if options.quick else 500
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = options.checkpoint or shared.train_tiny("bd3lm", Path(folder), stages=["pretrain"])
        model = models.load(checkpoint, dtype=torch.float32, device="cpu")
    model.objective = dataclasses.replace(model.objective, block_size=BLOCK)
    rows_BL = perplexity.rows_of_text(EvaluateConfig(text_length=LENGTH, text_rows=ROWS), model, seed=0)
    count = sum(weight.numel() for weight in model.parameters())
    generator = torch.Generator().manual_seed(1)
    bucket = torch.randint(SKETCH, (count,), generator=generator)
    sign = torch.randint(2, (count,), generator=generator) * 2.0 - 1

    losses, gradients, curve = {}, {}, []
    for name, changes in METHODS.items():
        config = TrainConfig(max_length=LENGTH, **changes)
        values, sketches = [], []
        for step in range(draws):
            value, layout, ce = draw(model, config, rows_BL, step)
            values.append(value)
            sketches.append(sketch(model, bucket, sign))
            if name == "iid":
                curve.append((1 / layout.weight_M, ce))
        losses[name], gradients[name] = torch.tensor(values)[:, None], torch.stack(sketches)

    print(f"{'draws of t':<24}{'loss':>8}{'loss variance':>15}{'x lower (95%)':>22}{'gradient variance':>19}{'x lower (95%)':>22}")
    found = {}
    for name in METHODS:
        base = "stratified, 2 views" if "2 views" in name else "per_sequence"
        of_loss, of_gradient = ratio(losses[base], losses[name]), ratio(gradients[base], gradients[name])
        found[name] = of_loss, of_gradient
        shown = [f"{r[0]:.2f} ({r[1]:.2f}-{r[2]:.2f})" for r in (of_loss, of_gradient)]
        print(
            f"{name:<24}{losses[name].mean():>8.3f}{variance(losses[name]):>15.2e}{shown[0]:>22}"
            f"{variance(gradients[name]):>19.2e}{shown[1]:>22}"
        )
    t, ce = (torch.cat(parts) for parts in zip(*curve, strict=True))
    print("\nt           " + "".join(f"{i / 10:>4.1f}-{(i + 1) / 10:.1f}" for i in range(10)))
    means = [ce[(t >= i / 10) & (t < (i + 1) / 10)].mean() for i in range(10)]
    print("nats        " + "".join(f"{mean:>8.3f}" for mean in means))
    shared.keep(options.output_dir, [{"t": (i + 0.5) / 10, "nats": float(mean)} for i, mean in enumerate(means)], plot(means))
    default = found["stratified (default)"]
    print(
        json.dumps({"ratios": {"loss_variance_b32_l512": round(default[0][0], 2), "gradient_variance_b32_l512": round(default[1][0], 2)}})
    )


if __name__ == "__main__":
    main()
