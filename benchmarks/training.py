"""Training cost of block diffusion: the plain method against ours, same model, same data, two noised views of each row.

    python benchmarks/training.py [--quick]
    python benchmarks/training.py --gpu       # the shape of Qwen3-0.6B in bfloat16 on CUDA, with the MFU

The plain method is what a reader of the papers would write first: for each view one forward pass over [x_t | x_0] with every
block noised, logits [B, L, V] for the whole noised half, and cross-entropy over all of it. Ours shares the clean stream
between the views, noises only blocks that can be scored, and runs the head only at masked positions. "Supervised" tokens are
those that are masked and scored. Speeds are measured with both methods in turn in one process, memory in a separate process
for each. Memory is the peak of resident (or CUDA) memory in a step, beyond the weights and their gradients. The MFU (model
FLOPs utilisation) is what a method's own matrix products need (6 FLOPs per weight and position, and attention for the pairs
that see each other), per second, divided by the speed of a large bfloat16 matrix product measured in the same run.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import shared

BLOCK, VIEWS = 32, 2
METHODS = ("plain", "ours")
SHAPE = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size")
SMALL, QWEN3_06B = (256, 6, 8, 4, 32, 768), (1024, 28, 16, 8, 128, 3072)


def build(cell: dict[str, Any]) -> Any:
    """A random Qwen3, small or of the shape of Qwen3-0.6B, as a diffusion model with blocks of 32."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from a2d_core import embedded
    from a2d_core.models import DiffusionModel, Spec

    torch.manual_seed(0)
    shape, vocabulary = QWEN3_06B if cell["device"] == "cuda" else SMALL, cell["vocabulary"]
    config = Qwen3Config(
        vocab_size=vocabulary, max_position_embeddings=2048, tie_word_embeddings=True, **dict(zip(SHAPE, shape, strict=True))
    )
    model = DiffusionModel(Qwen3ForCausalLM(config), embedded.build_tokenizer(), Spec("bd3lm", BLOCK, vocabulary - 1))
    return model.to(cell["device"]).train()


def make_batch(cell: dict[str, Any]) -> dict[str, Any]:
    """Random rows, 2,048 tokens in all (8,192 on a GPU); in SFT rows the first half is the prompt. Both methods get the same masks."""
    import torch

    from a2d_core import noise

    length, vocabulary = cell["length"], cell["vocabulary"]
    rows = (8192 if cell["device"] == "cuda" else 2048) // length
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocabulary - 1, (rows, length), generator=generator)
    turn = torch.ones_like(ids)
    if cell["rows"] == "sft":
        turn[:, : length // 2] = 0
    row, blocks = torch.arange(rows), length // BLOCK
    t = noise.draw_t("stratified", 0, 0, row, total_rows=rows, blocks=blocks, views=VIEWS, t_min=1e-3, t_max=1.0)
    t = t[:, :, torch.arange(length) // BLOCK]
    is_masked = noise.draw_mask(0, 0, row, t, turn > 0)
    return {name: value.to(cell["device"]) for name, value in {"ids": ids, "turn": turn, "is_masked": is_masked, "weight": 1 / t}.items()}


def ours(model: Any, batch: dict[str, Any]) -> Any:
    """The loss as the trainer computes it, the layout of the rows included."""
    streams = model.objective.streams(batch["ids"].cpu(), batch["turn"].cpu()).to(model.device)
    position = streams.noised.position.expand(VIEWS, len(batch["ids"]), -1)
    layout = model.objective.layout(streams, batch["is_masked"].gather(2, position), batch["weight"].gather(2, position))
    return model(layout)[0] / (VIEWS * batch["turn"].sum())


def plain(model: Any, batch: dict[str, Any], view: int) -> Any:
    """One view's share of the same loss from a dense [x_t | x_0] forward and full logits."""
    import torch
    import torch.nn.functional as F

    ids, is_masked, weight = batch["ids"], batch["is_masked"][view], batch["weight"][view]
    rows, length = ids.shape
    position = torch.arange(length, device=ids.device).repeat(2)
    block, is_noised = position // BLOCK, torch.arange(2 * length, device=ids.device) < length
    same_copy = is_noised[:, None] & is_noised[None, :] & (block[:, None] == block[None, :])
    before = ~is_noised[None, :] & torch.where(is_noised[:, None], block[None, :] < block[:, None], block[None, :] <= block[:, None])
    noised = torch.where(is_masked, model.spec.mask_token_id, ids)
    output = model.network.base_model(
        input_ids=torch.cat([noised, ids], 1),
        attention_mask=(same_copy | before)[None, None].expand(rows, 1, -1, -1),
        position_ids=position.expand(rows, -1),
        use_cache=False,
    )
    logits = model.network.lm_head(output.last_hidden_state[:, :length])
    ce = F.cross_entropy(logits.float().flatten(0, 1), ids.flatten(), reduction="none").view(rows, length)
    return (ce * weight * is_masked).sum() / (VIEWS * batch["turn"].sum())


def plain_step(model: Any, batch: dict[str, Any], arithmetic: Callable[[], AbstractContextManager[None]]) -> None:
    for view in range(VIEWS):
        with arithmetic():
            loss = plain(model, batch, view)
        loss.backward()


def ours_step(model: Any, batch: dict[str, Any], arithmetic: Callable[[], AbstractContextManager[None]]) -> None:
    with arithmetic():
        loss = ours(model, batch)
    loss.backward()


def measure_cell(cell: dict[str, Any]) -> dict[str, Any]:
    """Seconds per step of both methods, interleaved; or the memory peak of the method `peak_of`, which then runs alone."""
    import torch

    from a2d_core.models import attention_kernel

    device, model, batch = torch.device(cell["device"]), build(cell), make_batch(cell)
    for weight in model.parameters():
        weight.grad = torch.zeros_like(weight)

    @contextmanager
    def arithmetic() -> Iterator[None]:  # both methods get the attention kernel that trains faster here
        with torch.autocast(device.type, torch.bfloat16, enabled=cell["precision"] == "bfloat16"), attention_kernel(device):
            yield

    def step(name: str) -> float:
        model.set_attention("auto" if name == "ours" else "sdpa")
        start = time.perf_counter()
        {"plain": plain_step, "ours": ours_step}[name](model, batch, arithmetic)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    if cell["peak_of"]:
        return {"mib": memory_peak(lambda: step(cell["peak_of"]), device)}
    seconds: dict[str, list[float]] = {name: [] for name in METHODS}
    for name in METHODS * cell["warm_up"]:
        step(name)
    for name in METHODS * cell["repeats"]:
        seconds[name].append(step(name))
    tokens, supervised = batch["ids"].numel(), int(batch["is_masked"].sum())
    peak = matrix_peak(device) if device.type == "cuda" else None
    return {
        name: {
            "tokens_s": tokens / statistics.median(times),
            "supervised_s": supervised / statistics.median(times),
            "mfu": flops(model, batch, name) / statistics.median(times) / peak if peak else None,
        }
        for name, times in seconds.items()
    }


def flops(model: Any, batch: dict[str, Any], method: str) -> float:
    """What the matrix products of one step of a method need, forward and backward."""
    config, (rows, length) = model.network.config, batch["ids"].shape
    blocks = length // BLOCK
    if method == "plain":
        slots, scored = VIEWS * rows * 2 * length, VIEWS * rows * length
        pairs = VIEWS * rows * 2 * length * 2 * length  # a dense mask computes them all
    else:
        given = int((batch["turn"] == 0).sum(1).max()) // BLOCK
        slots = rows * (length - BLOCK + VIEWS * (length - given * BLOCK))
        scored = int(batch["is_masked"].sum())
        clean, noised = sum(range(1, blocks)), VIEWS * sum(range(given + 1, blocks + 1))
        pairs = rows * BLOCK * BLOCK * (clean + noised)
    inside = sum(weight.numel() for weight in model.parameters()) - config.vocab_size * config.hidden_size
    attention = 4 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * pairs
    return 3 * (2 * inside * slots + attention + 2 * config.vocab_size * config.hidden_size * scored)


def matrix_peak(device: Any) -> float:
    """FLOP/s of a large bfloat16 matrix product, the best of ten."""
    import torch

    a = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
    times = []
    for _ in range(10):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(5):
            a @ a
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return 5 * 2 * 8192**3 / min(times)


def memory_peak(step: Callable[[], object], device: Any) -> float:
    """MiB that a step needs at its peak, above what was there before it."""
    import torch

    if device.type == "cuda":
        step()  # compilation and workspaces
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    status = Path("/proc/self/status")
    Path("/proc/self/clear_refs").write_text("5")  # forget the earlier peak

    def read(field: str) -> float:
        return next(int(line.split()[1]) / 1024 for line in status.read_text().splitlines() if line.startswith(field))

    resident = read("VmRSS")
    step()
    return read("VmHWM") - resident


def plot(rows: list[dict[str, Any]]) -> Any:
    """Supervised tokens per second of both methods, a panel for each vocabulary."""
    vocabularies = sorted({row["vocabulary"] for row in rows})
    figure, axes = shared.figure(11, 4, len(vocabularies))
    for panel, vocabulary in zip(axes, vocabularies, strict=True):
        cells = [row for row in rows if row["vocabulary"] == vocabulary]
        groups = list(dict.fromkeys(f"{'SFT' if row['rows'] == 'sft' else 'text'} {row['length']}\n{row['precision']}" for row in cells))
        series = {name: [row["supervised_s"] for row in cells if row["method"] == name] for name in METHODS}
        shared.bars(panel, groups, series, title=f"vocabulary {vocabulary:,}", ylabel="supervised tokens per second")
    return figure


def main() -> None:
    parser = shared.parser(__doc__, "length 128 and float32 only, two repetitions")
    parser.add_argument("--gpu", action="store_true", help="the shape of Qwen3-0.6B in bfloat16 on CUDA")
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.cell:
        print(json.dumps(measure_cell(json.loads(options.cell))))
        return
    heads = ("tokens/s", 10), ("supervised/s", 14), ("peak MiB", 10), ("MFU", 7)
    print(
        f"{'rows':<7}{'vocabulary':>11}{'length':>8}{'precision':>11}  {'method':<7}" + "".join(f"{name:>{width}}" for name, width in heads)
    )
    if options.gpu:
        cells = [{"rows": rows, "vocabulary": 151936, "length": 512, "precision": "bfloat16"} for rows in ("plain", "sft")]
        common = {"device": "cuda", "warm_up": 3, "repeats": 10}
    else:
        grid = itertools.product(("plain", "sft"), (2048, 151936), (128,) if options.quick else (128, 512), ("float32",) if options.quick else ("float32", "bfloat16"))  # fmt: skip  # noqa: E501
        cells = [dict(zip(("rows", "vocabulary", "length", "precision"), values, strict=True)) for values in grid]
        common = {"device": "cpu", "warm_up": 1, "repeats": 2 if options.quick else 3}
    measured: list[dict[str, Any]] = []
    ratios: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for cell in cells:
        found = shared.in_a_process(__file__, {**cell, **common, "peak_of": None})
        for method in found:
            found[method] |= shared.in_a_process(__file__, {**cell, **common, "peak_of": method})
        for method, numbers in found.items():
            measured.append({**cell, "method": method, **numbers})
            mfu = "" if numbers["mfu"] is None else f"{numbers['mfu']:.0%}"
            print(f"{cell['rows']:<7}{cell['vocabulary']:>11,}{cell['length']:>8}{cell['precision']:>11}  {method:<7}{numbers['tokens_s']:>10,.0f}{numbers['supervised_s']:>14,.0f}{numbers['mib']:>10,.0f}{mfu:>7}", flush=True)  # fmt: skip  # noqa: E501
        ratio = found["ours"]["supervised_s"] / found["plain"]["supervised_s"], found["ours"]["mib"] / found["plain"]["mib"]
        ratios.setdefault((cell["rows"], cell["vocabulary"]), []).append(ratio)
    shared.keep(options.output_dir, measured, plot(measured))
    sft = {vocabulary: found for (rows, vocabulary), found in ratios.items() if rows == "sft"}
    result = {f"supervised_tokens_v{vocabulary}": min(speed for speed, _ in found) for vocabulary, found in sft.items()}
    result["activation_memory_v151936"] = max(memory for _, memory in sft[151936])
    print("the worst of the SFT cells:")
    print(json.dumps({"ratios": {name: round(value, 3) for name, value in result.items()}}))


if __name__ == "__main__":
    main()
