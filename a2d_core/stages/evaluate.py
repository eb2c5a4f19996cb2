"""Evaluate: score a checkpoint on tasks of lm-eval and on text, beside the untrained model and its autoregressive source."""

# Shapes: B rows of text, L positions

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections import defaultdict
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
from lm_eval.utils import handle_non_serializable
from torch import Tensor

from a2d_core import checkpoints, launch, models, perplexity, reading, registry, report, sandbox, suites, tasks
from a2d_core.config import EvaluateConfig, SampleConfig, require
from a2d_core.harness import DiffusionLM
from a2d_core.models import DiffusionModel
from a2d_core.scoring import Score
from a2d_core.settings import build, parse_override, to_dict
from a2d_core.stages import checks, table
from a2d_core.suites import Part

Row = dict[str, Any]
Key = tuple[str | None, int | None, int]
"""Task, document, and the place of a request in it."""

BOOTSTRAP = 1000
"""Resamples behind the standard error of a metric that has no formula for it."""
PACKAGES = ("torch", "transformers", "tokenizers", "accelerate", "datasets", "lm_eval", "numpy")
"""What a number may depend on."""
FRONTIER = ("task", "metric", "value", "stderr", "independent", "evaluations", "tokens", "documents", "is_main")
"""What a row of the frontier has of a row of the tasks."""
REVEAL = ("threshold", "entropy_budget", "steps_per_block")
"""Fields that say how many tokens an evaluation reveals: the frontier tries one of them at a time."""


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
    objective: str | None = None,
    champion: dict[str, float] | None = None,
) -> dict[str, Any]:
    """Score the checkpoint at `model_dir`. Returned, and written to results.json:

    `tasks`: a row for each task, metric and group: value, stderr, `independent` (where each answer is right or wrong: how many
    there are that err independently), `chance` (the word tasks), `baseline` (the score of the
    checkpoint at `baseline_dir`), `champion` (from `champion`, TASK/METRIC -> score), documents, `failed` (documents whose
    metrics raised or whose likelihood is not finite, which no mean counts), `evaluations` of the network and `tokens` per
    answer, higher_is_better; `is_main` of the row that stands for a task that was asked for, or an entry of the suite, which
    also has its name (`entry`), num_fewshot and `published`.
    `text`: see `perplexity.summary`; `pretrained_dir` is the checkpoint before fine-tuning, which may forget how to write
    plain text, `source_dir` the autoregressive model. `frontier`: rows of the tasks with other samplers. `questions`:
    TASK/METRIC, of main rows, and text/nelbo -> question -> its part of the value, by which two models are compared.

    Beside it: samples.jsonl, every answer; evaluation.json, all that it takes to repeat this; lm_eval.json (lm_eval_2.json ...
    for the parts of a suite with other settings), what lm-eval says; report.html and frontier.png. `processes` > 1 share the
    requests out on this machine, and find the same. Tasks, data and settings are checked before the first forward pass.
    """
    baseline_dir = baseline_dir if config.baseline else None
    _require_checkpoints(source_dir, model=model_dir, baseline=baseline_dir, pretrained=pretrained_dir)
    paths = {"model_dir": model_dir, "baseline_dir": baseline_dir, "pretrained_dir": pretrained_dir, "source_dir": source_dir}
    call: Row = {name: None if path is None else str(path) for name, path in paths.items()}
    call |= {"evaluate": to_dict(config), "sample": to_dict(sample), "seed": seed, "output_dir": str(output_dir)}
    call |= {"objective": objective, "champion": champion}
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
    objective: str | None,
    champion: dict[str, float] | None,
) -> Row:
    """What each process does; the first one writes."""
    started = time.perf_counter()
    config, sampler = build(EvaluateConfig, evaluate, "evaluate"), build(SampleConfig, sample, "sample")
    parts = suites.parts(config, sampler, objective or (checks.read_spec(model_dir) or {})["objective"])
    points = samplers(config.frontier, sampler)
    with PartialState().main_process_first(), _runs_programs(config):  # the others find what the first has cached
        loaded = [tasks.load(part.evaluate) for part in parts]
    model = models.load(model_dir, objective=objective)
    rows_BL = perplexity.rows_of_text(config, model, seed) if config.text_dataset else None
    bytes_B = None if rows_BL is None else perplexity.byte_counts(model.tokenizer, rows_BL)
    results, nats_B = _score(config, parts, loaded, model, rows_BL, seed)
    frontier = [(name, _score_parts(_with(parts, point), loaded, model, seed)) for name, point in points.items()]
    device = model.device
    del model
    baseline: tuple[list[Row] | None, Tensor | None] = (None, None)
    if baseline_dir is not None:
        baseline = _score(config, parts, loaded, models.load(baseline_dir, objective=objective), rows_BL, seed)
    summary: Row = {"tasks": table.summarise(parts, results, baseline[0], champion), "text": None}
    if rows_BL is not None and nats_B is not None and bytes_B is not None:
        pretrained_B = None
        if pretrained_dir is not None:
            pretrained_B = perplexity.nelbo(config, models.load(pretrained_dir, objective=objective), rows_BL, seed)
        ar_B = None if source_dir is None else perplexity.autoregressive(source_dir, rows_BL, device)
        tokens = rows_BL[:, 1:].numel()
        summary["text"] = perplexity.summary(nats_B, bytes_B, tokens, ar_B=ar_B, pretrained=pretrained_B, baseline=baseline[1])
    summary["frontier"] = [
        {"sampler": name, **{key: row[key] for key in FRONTIER}} for name, found in frontier for row in table.summarise(parts, found)
    ]
    summary["questions"] = table.by_question(summary["tasks"], rows_BL, nats_B)
    if PartialState().is_main_process:
        settings = {"evaluate": evaluate, "sample": sample, "seed": seed, "processes": PartialState().num_processes}
        paths = {"model": model_dir, "baseline": baseline_dir, "pretrained": pretrained_dir, "source": source_dir}
        record = settings | {"parts": [to_dict(part) for part in parts], **_surroundings(paths, device)}
        write(Path(output_dir), summary, results, baseline[0], record, started)
    return summary


def write(output_dir: Path, summary: Row, results: list[Row], baseline: list[Row] | None, record: Row, started: float) -> None:
    """Write the files that `run` names."""
    output_dir.mkdir(parents=True, exist_ok=True)
    answers = [row for found in results for row in table.sample_rows(found)]
    names = [(found, task) for found in results for task in found["samples"]]
    nfe, draws = ([value for found, task in names for value in table.numbers_of(found, task, name)] for name in ("nfe", "nelbo_samples"))
    record |= {"seconds": round(time.perf_counter() - started, 3), "evaluations": sum(nfe), "nelbo_samples": sum(map(sum, draws))}
    record["failed"] = sum(table.failed(found, task) for found, task in names)
    _write(output_dir / "results.json", summary)
    _write(output_dir / "evaluation.json", record)
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in answers)
    (output_dir / "samples.jsonl").write_text("".join(lines), encoding="utf-8")
    for name, found in (("lm_eval", results), ("lm_eval_baseline", baseline or [])):
        for i, content in enumerate(found):
            _write(output_dir / (f"{name}.json" if i == 0 else f"{name}_{i + 1}.json"), content)
    blocks = report.content(summary, answers, record)
    (output_dir / "report.html").write_text(report.html("Evaluation", blocks), encoding="utf-8")
    if summary["frontier"]:
        (output_dir / "frontier.png").write_bytes(report.plot(summary))


# --- tasks ----------------------------------------------------------------------------------------


def samplers(sweeps: Iterable[str], sample: SampleConfig) -> dict[str, SampleConfig]:
    """FIELD=VALUE -> the sampler with it, for `FIELD=VALUE,VALUE...` of each sweep; what else says how many tokens are revealed is off.

    Raises `UserError` for another field, and a value out of range.
    """
    found = {}
    for sweep in sweeps:
        (path, _), values = parse_override(sweep), sweep.partition("=")[2].split(",")
        require(path[0] in REVEAL and len(path) == 1, f"evaluate.frontier: '{sweep}' is none of {', '.join(f'{f}=...' for f in REVEAL)}")
        for value in values:
            name = f"{path[0]}={value.strip()}"
            base = {field: setting for field, setting in to_dict(sample).items() if field not in REVEAL}
            found[name] = build(SampleConfig, {**base, path[0]: parse_override(name)[1]}, f"evaluate.frontier, {name}")
    return found


def score_tasks(
    config: EvaluateConfig, sample: SampleConfig, model: DiffusionModel, loaded: list[Any], seed: int, generation: Row | None = None
) -> Row:
    """The results of lm-eval, with every sample, as its documentation describes them; and what `run` says of failures.

    `generation` wins over the tasks' own generation arguments. Empty in all processes but the first.
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
            gen_kwargs=generation or None,
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
    _annotate(results["samples"], lm.scores, lm.efforts, failures)
    return json.loads(json.dumps(results, default=handle_non_serializable))


def _annotate(samples: dict[str, list[Row]], scores: dict[Key, Score], efforts: dict[Key, Row], failures: dict[str, list[str]]) -> None:
    """Give each sample its likelihoods' standard errors and draws, what generating took, and the reason if it failed.

    Raises `UserError` if a whole task did.
    """
    of_document: dict[tuple[str | None, int | None], list[Score]] = defaultdict(list)
    for (task, document, _), score in sorted(scores.items(), key=str):
        of_document[task, document].append(score)
    for task, rows in samples.items():
        reasons = iter(failures[task])
        for row in rows:
            found = of_document[task, row["doc_id"]]
            row |= {"stderr": [score.stderr for score in found], "nelbo_samples": [score.samples for score in found]} if found else {}
            row |= efforts.get((task, row["doc_id"], 0), {})
            row["failed"] = None if row["metrics"] else next(reasons)
        require(
            any(row["failed"] is None for row in rows),
            f"every sample of task '{task}' failed, the first with: {rows[0]['failed']}. See that task and model suit, or leave it out",
        )


# --- what they share ------------------------------------------------------------------------------


def _score(
    config: EvaluateConfig, parts: list[Part], loaded: list[Any], model: DiffusionModel, rows_BL: Tensor | None, seed: int
) -> tuple[list[Row], Tensor | None]:
    """What one checkpoint makes of the tasks, and of the text."""
    results = _score_parts(parts, loaded, model, seed)
    return results, None if rows_BL is None else perplexity.nelbo(config, model, rows_BL, seed)


def _score_parts(parts: list[Part], loaded: list[Any], model: DiffusionModel, seed: int) -> list[Row]:
    """The results of each part; none in all processes but the first."""
    results = [
        score_tasks(part.evaluate, part.sample, model, some, seed, part.generation) for part, some in zip(parts, loaded, strict=True)
    ]
    return [found for found in results if found]


def _with(parts: list[Part], sample: SampleConfig) -> list[Part]:
    """The parts with another sampler, of which each keeps its own length."""
    return [dataclasses.replace(p, sample=dataclasses.replace(sample, max_new_tokens=p.sample.max_new_tokens)) for p in parts]


def _runs_programs(config: EvaluateConfig) -> AbstractContextManager[None]:
    return sandbox.code_eval(config.code_isolation) if config.code_execution else nullcontext()


def _surroundings(paths: dict[str, str | None], device: torch.device) -> Row:
    """What a number may depend on besides the settings: weights, versions, code, and the machine."""
    return {
        "paths": {role: None if path is None else str(Path(path).absolute()) for role, path in paths.items()},
        "weights": {role: None if path is None else checkpoints.digest(path) for role, path in paths.items()},
        "versions": {"python": sys.version.split()[0]} | {package: version(package) for package in PACKAGES},
        "code": registry.source_digest(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
    }


def _require_checkpoints(source_dir: str | Path | None, *, model: str | Path, **others: str | Path | None) -> None:
    for role, directory in others.items():
        require(
            directory is None or checks.read_spec(directory) is not None,
            f"{role} '{directory}' is not a diffusion checkpoint: convert it first",
        )
    for directory in (model, source_dir, *others.values()):
        if directory is not None and Path(directory).is_dir():
            reading.check_files(Path(directory))
    if source_dir is not None:
        require((Path(source_dir) / "config.json").is_file(), f"source '{source_dir}' is not the directory of a Hugging Face model")


def _write(path: Path, content: Row) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
