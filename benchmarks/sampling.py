"""Cost of block-diffusion sampling: the plain method against ours, the same weights, the same number of evaluations.

    python benchmarks/sampling.py [--quick] [--model DIR]

The plain method is what published samplers do: for each block the whole prefix is run again, for each step its cache is copied,
tokens are drawn with float64 Gumbel noise over the whole vocabulary, and positions are picked row by row. Beside it
are ours, ours with a confidence threshold of 0.9 (random weights are never that sure: one token per evaluation is the worst
case), and Hugging Face `generate` of the autoregressive model of the same size. Each number is measured in a process of its
own, one after the other, and where a ratio is taken three times, in turn; memory is the peak of resident memory above what was
resident before the run. What a threshold saves is counted on the trained `tiny` model, which is trained first unless `--model`
names it.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import shared

BLOCK = 32
REPORTED = (151936, 8, 512)
"""Vocabulary, batch and prompt of the ratios: measured in three rounds of all methods, and the median taken."""


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
    return DiffusionModel(Qwen3ForCausalLM(config), embedded.build_tokenizer(), Spec("bd3lm", BLOCK, vocabulary - 1)).eval()


def plain(model: Any, prompts_BP: Any, cell: dict[str, Any]) -> int:
    """The plain method; the prompt is a multiple of the block, and the number of evaluations is returned."""
    import torch
    from transformers import DynamicCache

    network, mask, steps, temperature = model.network, model.spec.mask_token_id, cell["steps_per_block"], cell["temperature"]
    tokens, evaluations = prompts_BP, 0
    for _ in range(cell["new_tokens"] // BLOCK):
        rows, length = tokens.shape
        position = torch.arange(length + BLOCK).expand(rows, -1)
        block = position // BLOCK
        may = (block[:, :, None] >= block[:, None, :])[:, None]
        cache = DynamicCache()
        network.base_model(tokens, attention_mask=may[:, :, :length, :length], position_ids=position[:, :length], past_key_values=cache)
        active = torch.full((rows, BLOCK), mask)
        for _ in range(steps):
            hidden = network.base_model(
                active, attention_mask=may[:, :, length:], position_ids=position[:, length:], past_key_values=copy.deepcopy(cache)
            ).last_hidden_state
            logits = network.lm_head(hidden)
            logits[..., mask] = -torch.inf
            evaluations += 1
            noisy = logits
            if temperature > 0:
                noisy = logits.double()
                noise = torch.rand_like(noisy)
                noisy = noisy.exp() / (-torch.log(noise)) ** temperature
            choice = noisy.argmax(-1)
            sure = logits.softmax(-1).gather(-1, choice[..., None])[..., 0].masked_fill(active != mask, -torch.inf)
            reveal = torch.zeros_like(active, dtype=torch.bool)
            for row in range(rows):
                reveal[row, sure[row].topk(BLOCK // steps).indices] = True
            active = torch.where(reveal, choice, active)
        tokens = torch.cat([tokens, active], 1)
    return evaluations


def ours(model: Any, prompts_BP: Any, cell: dict[str, Any], **changes: Any) -> int:
    """Our sampler, which may not end early: all methods write the same number of tokens."""
    from a2d_core import sampling
    from a2d_core.config import SampleConfig

    config = SampleConfig(
        max_new_tokens=cell["new_tokens"], steps_per_block=cell["steps_per_block"], temperature=cell["temperature"],
        batch_size=len(prompts_BP), suppressed_tokens=model.stop_token_ids,
    )  # fmt: skip
    found = sampling.generate(model, prompts_BP.tolist(), dataclasses.replace(config, **changes))
    assert all(len(generation.tokens) == cell["new_tokens"] for generation in found)
    return max(generation.nfe for generation in found)


def with_threshold(model: Any, prompts_BP: Any, cell: dict[str, Any]) -> int:
    return ours(model, prompts_BP, cell, steps_per_block=None, threshold=0.9)


def autoregressive(model: Any, prompts_BP: Any, cell: dict[str, Any]) -> int:
    """`generate` of the same network as an autoregressive model."""
    import torch

    new = cell["new_tokens"]
    options = {"do_sample": True, "temperature": cell["temperature"], "top_k": 0} if cell["temperature"] else {"do_sample": False}
    model.network.generation_config.eos_token_id = None
    out = model.network.generate(
        prompts_BP, attention_mask=torch.ones_like(prompts_BP), max_new_tokens=new, min_new_tokens=new, pad_token_id=0, **options
    )
    assert out.shape[1] == prompts_BP.shape[1] + new
    return new


METHODS: dict[str, Callable[[Any, Any, dict[str, Any]], int]] = {
    "plain": plain,
    "ours": ours,
    "threshold": with_threshold,
    "generate": autoregressive,
}


def measure_cell(cell: dict[str, Any]) -> dict[str, float]:
    """Tokens per second, evaluations and memory peak of one method."""
    import torch

    model = build(cell["vocabulary"])
    generator = torch.Generator().manual_seed(0)
    prompts_BP = torch.randint(300, cell["vocabulary"] - 1, (cell["batch"], cell["prompt"]), generator=generator)
    method, seconds, status = METHODS[cell["method"]], [], Path("/proc/self/status")

    def resident(field: str) -> float:
        return next(int(line.split()[1]) / 1024 for line in status.read_text().splitlines() if line.startswith(field))

    with torch.no_grad():
        method(model, prompts_BP, {**cell, "new_tokens": BLOCK, "steps_per_block": 1} | ({"new_tokens": 2} if cell["method"] == "generate" else {}))  # fmt: skip  # noqa: E501
        Path("/proc/self/clear_refs").write_text("5")  # forget the earlier peak
        before = resident("VmRSS")
        for _ in range(cell["repeats"]):
            start = time.perf_counter()
            evaluations = method(model, prompts_BP, cell)
            seconds.append(time.perf_counter() - start)
    tokens = cell["batch"] * cell["new_tokens"]
    return {"tokens_s": tokens / statistics.median(seconds), "nfe": evaluations, "mib": resident("VmHWM") - before}


def count_evaluations(directory: Path, prompts: int) -> dict[str, Any]:
    """Evaluations and exact answers of the trained tiny model on held-out word tasks, with and without a threshold."""
    from a2d_core import embedded, models, presets, sampling

    model = models.load(directory, device="cpu")
    config = presets.resolve(presets.read("tiny"), "bd3lm", [], 0).sample
    rows = list(embedded.instructions("test"))
    rows = rows[:: max(1, len(rows) // prompts)][:prompts]
    asked = [model.encode_messages(row["messages"][:-1]) for row in rows]
    found = {}
    for name, threshold in (("one token", None), ("threshold 0.9", 0.9)):
        answers = sampling.generate(model, asked, dataclasses.replace(config, threshold=threshold))
        right = sum(a.text == row["messages"][-1]["content"] for a, row in zip(answers, rows, strict=True))
        found[name] = {"nfe": sum(a.nfe for a in answers) / len(answers), "exact": right / len(rows)}
    return found


def plot(rows: list[dict[str, Any]]) -> Any:
    """Tokens per second of each method, greedy, a panel for each vocabulary."""
    vocabularies = sorted({row["vocabulary"] for row in rows})
    figure, axes = shared.figure(11, 4, len(vocabularies))
    for panel, vocabulary in zip(axes, vocabularies, strict=True):
        cells = [row for row in rows if row["vocabulary"] == vocabulary and row["temperature"] == 0]
        groups = list(dict.fromkeys(f"batch {row['batch']}\nprompt {row['prompt']}" for row in cells))
        series: dict[str, list[float]] = {}
        for row in cells:
            name = row["method"] if row["steps"] == "-" else f"{row['method']}, {row['steps']} steps"
            series.setdefault(name, []).append(row["tokens_s"])
        shared.bars(panel, groups, series, title=f"vocabulary {vocabulary:,}, greedy", ylabel="tokens per second")
    return figure


def runs_with(temperature: float, quick: bool) -> list[tuple[str, int]]:
    """Methods and their evaluations per block: 8 and 32 are 32 and 128 for 128 tokens; a threshold and `generate` know none.

    With a temperature the plain method runs with 8 only: each of its draws over the large vocabulary takes seconds.
    """
    few, many, others = [("plain", 8), ("ours", 8)], [("plain", 32), ("ours", 32)], [("threshold", 32), ("generate", 32)]
    if not temperature:
        return few + many + others
    return few if quick else few + many[1:] + others


def measure_all(quick: bool) -> list[dict[str, Any]]:
    """Print the table, a line as it is measured, and return its rows."""
    vocabularies, batches, lengths, new_tokens = (2048, 151936), (1, 8), (32, 512), 128
    if quick:
        (vocabularies, batches, lengths), new_tokens = ((value,) for value in REPORTED), 2 * BLOCK
    print(f"{'vocabulary':>10}{'batch':>7}{'prompt':>8}{'temperature':>13}{'steps':>7}  {'method':<10}{'tokens/s':>10}{'evaluations':>13}{'peak MiB':>10}")  # fmt: skip  # noqa: E501
    rows = []
    for *shape, temperature in itertools.product(vocabularies, batches, lengths, (0.0, 1.0)):
        cell = dict(zip(("vocabulary", "batch", "prompt", "temperature"), (*shape, temperature), strict=True))
        once = {**cell, "new_tokens": new_tokens, "repeats": 3 if shape[0] == 2048 else 1}
        runs = [{**once, "method": method, "steps_per_block": per_block} for method, per_block in runs_with(temperature, quick)]
        number = 3 if tuple(shape) == REPORTED and not quick else 1
        rounds = [[shared.in_a_process(__file__, run) for run in runs] for _ in range(number)]
        for run, *found in zip(runs, *rounds, strict=True):
            steps = run["steps_per_block"] * 4 if run["method"] in ("plain", "ours") else "-"
            medians = {name: statistics.median(one[name] for one in found) for name in ("tokens_s", "nfe", "mib")}
            rows.append(row := {**cell, "method": run["method"], "steps": steps, **medians})
            print("{vocabulary:>10,}{batch:>7}{prompt:>8}{temperature:>13}{steps:>7}  {method:<10}{tokens_s:>10,.1f}{nfe:>13}{mib:>10,.0f}".format(**row), flush=True)  # fmt: skip  # noqa: E501
    return rows


def main() -> None:
    parser = shared.parser(__doc__, "one vocabulary, batch and prompt, two blocks, a quarter of the training")
    parser.add_argument("--model", type=Path, help="trained tiny checkpoint, to spare its training")
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.cell:
        print(json.dumps(measure_cell(json.loads(options.cell))))
        return
    rows = measure_all(options.quick)
    speed = {
        (*(row[name] for name in ("vocabulary", "batch", "prompt", "temperature", "method", "steps")),): row["tokens_s"] for row in rows
    }

    def ratio(steps: int, temperature: float) -> float:
        ours, plain = (speed[*REPORTED, temperature, method, steps] for method in ("ours", "plain"))
        return ours / plain

    with tempfile.TemporaryDirectory() as folder:
        trained = options.model or shared.train_tiny("bd3lm", Path(folder), 0.25 if options.quick else 1.0)
        tiny = count_evaluations(trained, 40 if options.quick else 200)
    for name, numbers in tiny.items():
        print(f"tiny model, {name:<14}{numbers['nfe']:>6.2f} evaluations per answer, {numbers['exact']:.3f} exact")
    shared.keep(options.output_dir, rows, plot(rows))
    result = {
        "b8_p512_s32": ratio(32, 0.0),
        "b8_p512_s128": ratio(128, 0.0),
        "temperature1_v151936": ratio(32, 1.0),
        "threshold_evaluations": tiny["one token"]["nfe"] / tiny["threshold 0.9"]["nfe"],
    }
    print("ours over plain at vocabulary 151,936, batch 8, prompt 512 (with temperature 1: 32 evaluations), and one token over threshold:")
    print(json.dumps({"ratios": {name: round(value, 3) for name, value in result.items()}}))


if __name__ == "__main__":
    main()
