"""Evaluate: score a checkpoint on tasks of lm-eval and on held-out text, beside the untrained model and its autoregressive source."""

# Shapes: B rows of text, L positions, V vocabulary

from __future__ import annotations

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
from lm_eval.utils import handle_non_serializable
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM

from a2d_core import data, embedded, launch, likelihood, models, tasks
from a2d_core.config import EvaluateConfig, SampleConfig, UserError, build, require, to_dict
from a2d_core.harness import DiffusionLM
from a2d_core.models import DiffusionModel
from a2d_core.scoring import Score
from a2d_core.stages import checks

Row = dict[str, Any]

BOOTSTRAP = 1000
"""Resamples behind the standard error of a metric that has no formula for it."""
AR_ELEMENTS = 1 << 24
"""Logits of the autoregressive model held at once: 64 MiB of float32."""


def run(
    config: EvaluateConfig,
    sample: SampleConfig,
    model_dir: str | Path,
    output_dir: str | Path,
    *,
    seed: int = 0,
    processes: int = 1,
    baseline_dir: str | Path | None = None,
    pretrained_dir: str | Path | None = None,
    source_dir: str | Path | None = None,
) -> dict[str, Any]:
    """Score the checkpoint at `model_dir`; write results.json (what is returned) and lm_eval.json (all that lm-eval says).

    `processes` > 1 share the requests out on this machine, and find the same. `tasks`: a row for each task, metric and
    group: value, stderr, `chance` (the word tasks), `baseline` (the score of the checkpoint at `baseline_dir`), documents,
    `failed` (documents whose metrics raised, which no mean counts, or whose likelihood is not finite), higher_is_better;
    each sample in lm_eval.json has the standard errors and draws of its likelihoods, and says why it failed.
    `text`: nats per token of held-out rows whose first token is
    given: `nelbo` with its stderr over rows, `pretrained_nelbo` of the checkpoint at `pretrained_dir` (before fine-tuning, which
    may forget how to write plain text), `baseline_nelbo`, and `ar_nll`, the loss of the autoregressive model at
    `source_dir` on the same tokens. Tasks, data and settings are checked before the first forward pass.
    """
    baseline_dir = baseline_dir if config.baseline else None
    _require_checkpoints(source_dir, model=model_dir, baseline=baseline_dir, pretrained=pretrained_dir)
    paths = {"model_dir": model_dir, "output_dir": output_dir, "baseline_dir": baseline_dir}
    paths |= {"pretrained_dir": pretrained_dir, "source_dir": source_dir}
    call: Row = {name: None if path is None else str(path) for name, path in paths.items()}
    call |= {"evaluate": to_dict(config), "sample": to_dict(sample), "seed": seed}
    return launch.run("a2d_core.stages.evaluate:work", call, processes=processes)


def work(
    evaluate: Row,
    sample: Row,
    model_dir: str,
    output_dir: str,
    seed: int,
    baseline_dir: str | None,
    pretrained_dir: str | None,
    source_dir: str | None,
) -> Row:
    """What each process does; the first one writes."""
    config, sampler = build(EvaluateConfig, evaluate, "evaluate"), build(SampleConfig, sample, "sample")
    with PartialState().main_process_first():  # the others find what the first has cached
        loaded = tasks.load(config)
    model = models.load(model_dir)
    rows_BL = held_out_rows(config, model, seed) if config.text_dataset else None
    results, nats_B = _score(config, sampler, model, loaded, rows_BL, seed)
    device = model.device
    del model
    baseline: tuple[Row | None, Tensor | None] = (None, None)
    if baseline_dir is not None:
        baseline = _score(config, sampler, models.load(baseline_dir), loaded, rows_BL, seed)
    summary: Row = {"tasks": table(results, baseline[0]) if results else [], "text": None}
    if rows_BL is not None and nats_B is not None:
        pretrained_B = None if pretrained_dir is None else score_text(config, models.load(pretrained_dir), rows_BL, seed)
        ar_nll = None if source_dir is None else autoregressive_nll(source_dir, rows_BL, device)
        summary["text"] = text_summary(nats_B, pretrained_B, baseline[1], ar_nll, tokens=rows_BL[:, 1:].numel())
    if PartialState().is_main_process:
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        _write(Path(output_dir) / "results.json", summary)
        for name, content in (("lm_eval.json", results), ("lm_eval_baseline.json", baseline[0])):
            if content is not None:
                _write(Path(output_dir) / name, content)
    return summary


# --- tasks ----------------------------------------------------------------------------------------


def score_tasks(config: EvaluateConfig, sample: SampleConfig, model: DiffusionModel, loaded: list[Any], seed: int) -> Row:
    """The results of lm-eval, with every sample, as its documentation describes them; and what `run` says of failures.

    Empty in all processes but the first.
    """
    leaves = tasks.leaves(loaded)
    lm = DiffusionLM(
        model,
        sample=sample,
        likelihood=config.likelihood,
        order=config.order,
        nelbo_samples=config.nelbo_samples,
        max_nelbo_samples=config.max_nelbo_samples,
        batch_tokens=config.batch_tokens,
        batch_size=config.batch_size,
        seed=seed,
    )
    if config.apply_chat_template:
        lm.apply_chat_template([{"role": "user", "content": "?"}])
    lm.plan(leaves)
    with tasks.quiet(config.code_execution), tasks.recorded_failures(leaves) as failures:
        results = simple_evaluate(
            model=lm,
            tasks=loaded,
            task_manager=TaskManager(include_defaults=False),  # they are loaded: without lm-eval's index of 14,000 files
            num_fewshot=config.num_fewshot,
            limit=config.limit,
            apply_chat_template=config.apply_chat_template,
            fewshot_as_multiturn=config.apply_chat_template,
            bootstrap_iters=BOOTSTRAP,
            log_samples=True,
            confirm_run_unsafe_code=config.code_execution,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
    if results is None:  # another process has them
        return {}
    _annotate(results["samples"], lm.scores, failures)
    return json.loads(json.dumps(results, default=handle_non_serializable))


def _annotate(
    samples: dict[str, list[Row]], scores: dict[tuple[str | None, int | None, int], Score], failures: dict[str, list[str]]
) -> None:
    """Give each sample its likelihoods' standard errors and draws, and the reason if it failed. Raises `UserError` if a whole task did."""
    of_document: dict[tuple[str | None, int | None], list[Score]] = defaultdict(list)
    for (task, document, _), score in sorted(scores.items(), key=str):
        of_document[task, document].append(score)
    for task, rows in samples.items():
        reasons = iter(failures[task])
        for row in rows:
            found = of_document[task, row["doc_id"]]
            row |= {"stderr": [score.stderr for score in found], "nelbo_samples": [score.samples for score in found]} if found else {}
            row["failed"] = None if row["metrics"] else next(reasons)
            if row["failed"] is None and not all(math.isfinite(score.nats) for score in found):
                row["failed"] = "the likelihood is not finite"
        require(
            any(row["failed"] is None for row in rows),
            f"every sample of task '{task}' failed, the first with: {rows[0]['failed']}. See that task and model suit, or leave it out",
        )


def table(results: Row, baseline: Row | None) -> list[Row]:
    """A row for each task and metric in lm-eval's results, the groups with a mean of their own behind the tasks."""
    rows = []
    for name, numbers in results["results"].items():
        for key in (key for key in numbers if "," in key and "_stderr," not in key):
            metric, _, variant = key.partition(",")
            if not isinstance(numbers[key], (int, float)):
                continue
            members = results["group_subtasks"].get(name, [name])
            is_words = set(members) <= set(embedded.TASKS)
            stderr = _words_stderr(results, members) if is_words else numbers.get(f"{metric}_stderr,{variant}")
            rows.append(
                {
                    "task": name,
                    "metric": metric if variant == "none" else f"{metric}/{variant}",
                    "value": float(numbers[key]),
                    "stderr": float(stderr) if isinstance(stderr, (int, float)) else None,
                    "chance": sum(map(embedded.chance_level, members)) / len(members) if is_words else None,
                    "baseline": float(baseline["results"][name][key]) if baseline else None,
                    "documents": numbers["sample_len"],
                    "failed": _failed(results, name),
                    "higher_is_better": results["higher_is_better"].get(name, {}).get(metric),
                }
            )
    return rows


def _failed(results: Row, name: str) -> int:
    """Documents of a task, or of the tasks of a group, that failed."""
    if name in results["samples"]:
        return len({row["doc_id"] for row in results["samples"][name] if row.get("failed")})
    return sum(_failed(results, member) for member in results["group_subtasks"][name])


def _words_stderr(results: Row, members: list[str]) -> float | None:
    """Standard error of the mean over word tasks: over words, since tasks that ask about the same word do not err independently."""
    by_word = defaultdict(list)
    for sample in (sample for task in members for sample in results["samples"][task]):
        by_word[sample["doc"]["word"]].append(sample["exact_match"])
    means = [statistics.fmean(scores) for scores in by_word.values()]
    return statistics.stdev(means) / len(means) ** 0.5 if len(means) > 1 else None


# --- text -----------------------------------------------------------------------------------------


def held_out_rows(config: EvaluateConfig, model: DiffusionModel, seed: int) -> Tensor:
    """rows_BL: token ids of at most `config.text_rows` rows, spread evenly over the held-out part of the text."""
    context = model.context
    require(
        context is None or config.text_length <= context,
        f"evaluate.text_length={config.text_length} is more than the model's context of {context} positions: lower it",
    )
    _, held_out = data.load_documents(str(config.text_dataset), config.reading(), seed)
    rows, _ = data.pretraining_rows(held_out, model.tokenizer, config.text_length, insert_eos=True)
    count = min(config.text_rows, len(rows))
    return torch.tensor(rows.select([place * len(rows) // count for place in range(count)])["input_ids"][:])


def score_text(config: EvaluateConfig, model: DiffusionModel, rows_BL: Tensor, seed: int) -> Tensor:
    """nats_B: the NELBO of each row, its first token given. The noise of a row depends on the seed and its number alone."""
    maskable_1L = (torch.arange(rows_BL.shape[1]) > 0).long()[None]

    def score(rows: list[int]) -> list[float]:
        nats: list[float] = []
        for batch in _batches(len(rows), config.batch_size, "scoring held-out text"):
            ids_BL, rows_B = rows_BL[rows[batch]], torch.tensor(rows[batch], device=model.device)
            streams = model.objective.streams(ids_BL, maskable_1L.expand_as(ids_BL)).to(model.device)
            nats += likelihood.nelbo(model, streams, samples=config.nelbo_samples, seed=seed, rows_B=rows_B).nats_B.tolist()
        return nats

    return torch.tensor(launch.divide(range(len(rows_BL)), score))


@torch.no_grad()
def autoregressive_nll(source_dir: str | Path, rows_BL: Tensor, device: torch.device) -> float:
    """The autoregressive model's mean loss, in nats per token, on tokens 1..L-1 of each row given those before them."""
    try:
        network = AutoModelForCausalLM.from_pretrained(source_dir, dtype="auto", use_safetensors=True).to(device).eval()
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load the autoregressive model '{source_dir}': {' '.join(str(error).split())}") from error
    vocabulary = network.config.get_text_config().vocab_size
    require(
        int(rows_BL.max()) < vocabulary,
        f"'{source_dir}' has {vocabulary} tokens and the text has token {int(rows_BL.max())}: it is not the source of this checkpoint",
    )
    total, size = 0.0, max(1, AR_ELEMENTS // (rows_BL.shape[1] * vocabulary))
    for batch in _batches(len(rows_BL), size, "scoring the autoregressive model"):
        ids_BL = rows_BL[batch].to(device)
        logits_BLV = network(input_ids=ids_BL, use_cache=False).logits[:, :-1].float()
        total += torch.nn.functional.cross_entropy(logits_BLV.flatten(0, 1), ids_BL[:, 1:].flatten(), reduction="sum").item()
    return total / rows_BL[:, 1:].numel()


def text_summary(nats_B: Tensor, pretrained_B: Tensor | None, baseline_B: Tensor | None, ar_nll: float | None, tokens: int) -> Row:
    """Nats per token of rows of equal length, `tokens` in all, from the nats of each row."""

    def per_token(nats_B: Tensor | None) -> float | None:
        return None if nats_B is None else nats_B.double().sum().item() / tokens

    per_token_B = nats_B.double() * len(nats_B) / tokens
    return {
        "nelbo": per_token_B.mean().item(),
        "stderr": (per_token_B.std() / len(nats_B) ** 0.5).item() if len(nats_B) > 1 else None,
        "pretrained_nelbo": per_token(pretrained_B),
        "baseline_nelbo": per_token(baseline_B),
        "ar_nll": ar_nll,
        "perplexity_bound": math.exp(per_token_B.mean().item()),
        "tokens": tokens,
    }


# --- what they share ------------------------------------------------------------------------------


def _score(
    config: EvaluateConfig, sample: SampleConfig, model: DiffusionModel, loaded: list[Any], rows_BL: Tensor | None, seed: int
) -> tuple[Row | None, Tensor | None]:
    """What one checkpoint makes of the tasks, and of the text."""
    results = score_tasks(config, sample, model, loaded, seed) if loaded else None
    return results, None if rows_BL is None else score_text(config, model, rows_BL, seed)


def _require_checkpoints(source_dir: str | Path | None, *, model: str | Path, **others: str | Path | None) -> None:
    for role, directory in others.items():
        require(
            directory is None or checks.read_spec(directory) is not None,
            f"{role} '{directory}' is not a diffusion checkpoint: convert it first",
        )
    for directory in (model, source_dir, *others.values()):
        if directory is not None:
            checks.intact(directory)
    if source_dir is not None:
        require((Path(source_dir) / "config.json").is_file(), f"source '{source_dir}' is not the directory of a Hugging Face model")


def _batches(rows: int, size: int, name: str) -> Iterator[slice]:
    for start in tqdm(range(0, rows, size), desc=name, unit="batch", disable=None):
        yield slice(start, start + size)


def _write(path: Path, content: Row) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
