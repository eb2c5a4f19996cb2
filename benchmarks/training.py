"""Training cost of block diffusion: the plain method against ours, same model, same data, two noised views of each row.

    python benchmarks/training.py [--quick]

The plain method is what a reader of the papers writes first: for each view one forward over [x_t | x_0] with every
block noised, logits [B, L, V] for the whole noised half, and cross-entropy over all of it. Ours shares the clean stream
between the views, noises only blocks that can be scored, and runs the head at masked positions. Speeds are
measured with both methods in turn in one process, memory in a process for each; supervised means masked, scored positions.
Memory is the peak of resident memory in a step, above what the weights and their gradients take.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

BLOCK, VIEWS = 32, 2


def build(vocabulary: int) -> Any:
    """A random Qwen3 of hidden size 256 and 6 layers, as a diffusion model with blocks of 32."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from a2d_core import embedded
    from a2d_core.models import DiffusionModel, Spec

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=vocabulary, hidden_size=256, num_hidden_layers=6, num_attention_heads=8, num_key_value_heads=4, head_dim=32,
        intermediate_size=768, max_position_embeddings=2048, tie_word_embeddings=True,
    )  # fmt: skip
    return DiffusionModel(Qwen3ForCausalLM(config), embedded.build_tokenizer(), Spec("bd3lm", BLOCK, vocabulary - 1)).train()


def make_batch(vocabulary: int, length: int, is_sft: bool) -> dict[str, Any]:
    """Random rows, 2,048 tokens in all; in SFT rows the first half is the prompt. The masks are the same for both methods."""
    import torch

    from a2d_core import noise

    rows = 2048 // length
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocabulary - 1, (rows, length), generator=generator)
    turn = torch.ones_like(ids)
    if is_sft:
        turn[:, : length // 2] = 0
    row, blocks = torch.arange(rows), length // BLOCK
    t = noise.draw_t("stratified", 0, 0, row, total_rows=rows, blocks=blocks, views=VIEWS, t_min=1e-3, t_max=1.0)
    t = t[:, :, torch.arange(length) // BLOCK]
    is_masked = noise.draw_mask(0, 0, row, t, turn > 0)
    return {"ids": ids, "turn": turn, "is_masked": is_masked, "weight": 1 / t}


def ours(model: Any, batch: dict[str, Any]) -> Any:
    """The loss as the trainer computes it."""
    streams = model.objective.streams(batch["ids"], batch["turn"])
    position = streams.noised.position.expand(VIEWS, len(batch["ids"]), -1)
    layout = model.objective.layout(streams, batch["is_masked"].gather(2, position), batch["weight"].gather(2, position))
    return model(layout)[0] / (VIEWS * batch["turn"].sum())


def plain(model: Any, batch: dict[str, Any], view: int) -> Any:
    """One view's share of the same loss from a dense [x_t | x_0] forward and full logits."""
    import torch
    import torch.nn.functional as F

    ids, is_masked, weight = batch["ids"], batch["is_masked"][view], batch["weight"][view]
    rows, length = ids.shape
    position = torch.arange(length).repeat(2)
    block, is_noised = position // BLOCK, torch.arange(2 * length) < length
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

    model = build(cell["vocabulary"])
    batch = make_batch(cell["vocabulary"], cell["length"], cell["rows"] == "sft")
    for weight in model.parameters():
        weight.grad = torch.zeros_like(weight)

    @contextmanager
    def arithmetic() -> Iterator[None]:  # both methods get the attention kernel that trains faster here
        with torch.autocast("cpu", torch.bfloat16, enabled=cell["precision"] == "bfloat16"), attention_kernel(torch.device("cpu")):
            yield

    steps = {"plain": plain_step, "ours": ours_step}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    if cell["peak_of"]:
        return {"mib": memory_peak(lambda: steps[cell["peak_of"]](model, batch, arithmetic))}
    for step in steps.values():
        step(model, batch, arithmetic)  # warm up
    for _ in range(cell["repeats"]):
        for name, step in steps.items():
            start = time.perf_counter()
            step(model, batch, arithmetic)
            seconds[name].append(time.perf_counter() - start)
    tokens, supervised = batch["ids"].numel(), int(batch["is_masked"].sum())
    return {
        name: {"tokens_s": tokens / statistics.median(times), "supervised_s": supervised / statistics.median(times)}
        for name, times in seconds.items()
    }


def memory_peak(step: Callable[[], None]) -> float:
    """MiB of resident memory that a step needs at its peak, above what was resident before it."""
    status = Path("/proc/self/status")
    Path("/proc/self/clear_refs").write_text("5")  # forget the earlier peak

    def read(field: str) -> float:
        return next(int(line.split()[1]) / 1024 for line in status.read_text().splitlines() if line.startswith(field))

    before = read("VmRSS")
    step()
    return read("VmHWM") - before


def in_a_process(cell: dict[str, Any]) -> dict[str, Any]:
    """What `measure_cell` finds in a new process."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    command = [sys.executable, __file__, "--cell", json.dumps(cell)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="length 128 and float32 only, two repetitions: under 5 minutes")
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.cell:
        print(json.dumps(measure_cell(json.loads(options.cell))))
        return
    lengths, precisions = ((128,), ("float32",)) if options.quick else ((128, 512), ("float32", "bfloat16"))
    ratios: dict[tuple[str, int], list[tuple[float, float]]] = {}
    print(f"{'rows':<7}{'vocabulary':>11}{'length':>8}{'precision':>11}  {'method':<7}{'tokens/s':>10}{'supervised/s':>14}{'peak MiB':>10}")
    for rows, vocabulary, length, precision in itertools.product(("plain", "sft"), (2048, 151936), lengths, precisions):
        cell = {"rows": rows, "vocabulary": vocabulary, "length": length, "precision": precision, "repeats": 2 if options.quick else 5}
        found = in_a_process({**cell, "peak_of": None})
        for method in found:
            found[method] |= in_a_process({**cell, "peak_of": method})
        for method, numbers in found.items():
            print(f"{rows:<7}{vocabulary:>11,}{length:>8}{precision:>11}  {method:<7}{numbers['tokens_s']:>10,.0f}{numbers['supervised_s']:>14,.0f}{numbers['mib']:>10,.0f}", flush=True)  # fmt: skip  # noqa: E501
        ratio = found["ours"]["supervised_s"] / found["plain"]["supervised_s"], found["ours"]["mib"] / found["plain"]["mib"]
        ratios.setdefault((rows, vocabulary), []).append(ratio)
    speed, memory = {v: min(r[0] for r in ratios["sft", v]) for v in (2048, 151936)}, max(r[1] for r in ratios["sft", 151936])
    result = {"supervised_tokens_v151936": speed[151936], "supervised_tokens_v2048": speed[2048], "activation_memory_v151936": memory}
    print("the worst of the SFT cells:")
    print(json.dumps({"ratios": {name: round(value, 3) for name, value in result.items()}}))


if __name__ == "__main__":
    main()
