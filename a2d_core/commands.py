"""What the commands of the command line do: resolve the recipe, look before they work, run a stage, tell what came of it.

Each takes the parsed arguments, prints, and raises `UserError` for what the user can mend, before any work.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from a2d_core import launch, presets, strategies, suites, tracking
from a2d_core.config import OBJECTIVES, STAGES, Recipe, TrackingConfig, parse_sources, require
from a2d_core.follow import Follower
from a2d_core.settings import build, parse_override, to_dict
from a2d_core.stages import checks, prompts

USES = {
    "convert": ("convert",),
    "pretrain": ("pretrain",),
    "sft": ("sft",),
    "sample": ("sample",),
    "chat": ("sample",),
    "evaluate": ("evaluate", "sample"),
}
"""Command -> the stages whose fields it takes; a field without its stage belongs to the first."""
UNREAD = {
    "chat": {"sample.prompts": "type the prompt", "sample.chat": "use --raw", "sample.batch_size": "a chat has one prompt at a time"},
    "evaluate": {"sample.prompts": "the tasks bring their own", "evaluate.baseline": "use --baseline DIR"},
}
"""Command -> the fields of its stages that it does not read, and why; `enabled` is one for every command."""
SHOWN = 8
"""Samples that are printed; the others are in the file."""
LOGGED = ("answer", "tokens", "nfe", "seconds")
"""Columns of the table of samples in MLflow, beside the prompt."""


def convert(args: argparse.Namespace) -> None:
    """Make a diffusion checkpoint."""
    recipe = _resolve(args, args.objective, [_option("convert.model", args.model)])
    with _work(args, recipe, inputs=(recipe.convert.model,)) as output_dir:
        from a2d_core.stages import convert as stage

        result = stage.run(recipe.convert, recipe.objective, output_dir, seed=recipe.seed)
        if args.mlflow is not None:
            tracking.log_numbers(result)
    _tell(result)
    print(f"\nthe checkpoint is {output_dir}: train it with  python -m a2d_core sft --model {output_dir} --output-dir DIR")


def train(args: argparse.Namespace) -> None:
    """Pretrain or fine-tune."""
    stage = args.command
    recipe = _resolve_for_model(args, [_option(f"{stage}.dataset", args.dataset)])
    config, compute = getattr(recipe, stage), recipe.compute.train
    strategy = args.strategy or compute.strategy
    strategies.file(strategy)
    nodes = launch.Nodes(args.nodes, args.node_rank, args.main_address)
    is_main = nodes.rank == 0  # it alone writes and tracks; the others hear from it where they see other checkpoints than it does
    resume_from = checks.newest_checkpoint(args.output_dir, required=is_main) if args.resume else None
    work = (
        _work(args, recipe, inputs=(args.model, *(source.ref for source in parse_sources(config.dataset))))
        if is_main
        else nullcontext(Path(args.output_dir))
    )
    with work as output_dir:
        from transformers.utils import logging

        from a2d_core.stages import pretrain, sft

        logging.disable_progress_bar()  # one for each checkpoint that is written
        follower = Follower(output_dir, log=tracking.MetricLog()) if is_main and args.mlflow is not None else None
        with follower or nullcontext():
            result = {"pretrain": pretrain.run, "sft": sft.run}[stage](
                config,
                args.model,
                output_dir,
                seed=recipe.seed,
                processes=compute.processes if args.processes is None else args.processes,
                strategy=strategy,
                nodes=nodes,
                resume_from=resume_from,
                objective=recipe.objective,
            )
        why = tracking.refusal(stage, result, follower.refused) if follower else None
        require(
            why is None,
            f"training is done, '{output_dir}/checkpoint-final' is its model, but MLflow does not take the metrics ({why}): they are in "
            f"'{output_dir}/metrics.jsonl'; start MLflow again, and the same command with --resume sends them without training again",
        )
    _tell(result)
    final, command = f"{output_dir}/checkpoint-final", "chat" if stage == "sft" else "chat --raw"
    print(f"\nthe checkpoint is {final}: try it with  python -m a2d_core {command} --model {final}")


def sample(args: argparse.Namespace) -> None:
    """Generate, and print what came."""
    rows = prompts.read(args.prompts, infill=args.infill) if args.prompts else None
    recipe = _resolve_for_model(args, [_option("sample.prompts", args.prompt)])
    require(not (args.infill and args.animate), "--animate replays answers, not infills: leave out one of the two")
    folder = args.animate.absolute().parent if args.animate else None
    require(
        folder is None or (args.animate.suffix == ".html" and folder.is_dir()),
        f"--animate {args.animate}: give a file .html in a folder that exists",
    )
    output = args.output or Path(args.output_dir, "samples.jsonl")
    require(output.suffix == ".jsonl", f"--output {output}: give a file with the ending .jsonl, or a directory with --output-dir")
    require(
        args.resume or args.overwrite or not output.exists(),
        f"'{output}' exists already: continue it with --resume, replace it with --overwrite, or choose another",
    )
    with _work(args, recipe, inputs=(args.model, args.prompts)):
        from a2d_core.stages import sample as stage

        result = stage.run(
            recipe.sample,
            args.model,
            output,
            seed=recipe.seed,
            rows=rows,
            resume=args.resume,
            infill=args.infill,
            animate=args.animate,
            objective=recipe.objective,
        )
        if args.mlflow is not None:
            tracking.log_samples([{"prompt": stage.text(row), **{n: row[n] for n in LOGGED}} for row in result["samples"]])
    for row in result["samples"][:SHOWN]:
        print(stage.text(row), f"  {row['answer']}", sep="\n")
        print(f"  ({row['tokens']} tokens, {row['nfe']} evaluations, {row['seconds']:.2f} s)\n")
    print(f"{result['answered']} prompts answered, {result['skipped']} skipped: the answers are in {output}")
    if args.animate:
        print(f"the replay is {args.animate}: open it in a browser")


def chat(args: argparse.Namespace) -> None:
    """Talk to a model."""
    recipe = _resolve_for_model(args, [])
    require(args.pace >= 0, f"--pace {args.pace}: give seconds, 0 or more")
    from a2d_core import terminal

    with checks.memory_advice("sample", recipe.sample):
        terminal.run(
            recipe.sample,
            args.model,
            raw=args.raw,
            forget=args.forget,
            system=args.system,
            pace=args.pace,
            seed=recipe.seed,
            objective=recipe.objective,
            fixed={name.partition(".")[2]: why for name, why in UNREAD["chat"].items()} | {"enabled": "it is"},
        )


def evaluate(args: argparse.Namespace) -> None:
    """Score, and print the table; or repeat an evaluation, and compare."""
    if args.repeat:
        _repeat(args)
        return
    require(bool(args.model), "evaluate needs --model DIR (or --repeat RUN_ID, for an evaluation that MLflow has)")
    _require_one_source_of_tasks(args)
    tasks = [task for task in args.tasks.split(",") if task] if args.tasks is not None else None
    if tasks is None and args.perplexity and not args.suite:
        tasks = []
    text = args.perplexity or args.dataset
    options = [
        _option("evaluate.tasks", tasks),
        _option("evaluate.suite", args.suite),
        _option("evaluate.frontier", args.frontier),
        _option("evaluate.baseline", bool(args.baseline)),
        f"evaluate.text_dataset={text}" if text else None,
        _option("evaluate.text_part", "all" if args.perplexity else None),
    ]
    recipe = _resolve_for_model(args, options)
    with _work(args, recipe, inputs=(args.model, args.baseline, args.source)) as output_dir:
        from a2d_core.stages import evaluate as stage

        result = stage.run(
            recipe.evaluate,
            recipe.sample,
            args.model,
            output_dir,
            seed=recipe.seed,
            processes=recipe.compute.generate.processes if args.processes is None else args.processes,
            baseline_dir=args.baseline,
            source_dir=args.source,
            objective=recipe.objective,
            champion=tracking.champion_numbers(args.champion) if args.champion else None,
        )
        if args.mlflow is not None:
            tracking.log_evaluation(result, output_dir)
    _tell_evaluation(result, output_dir)


def _require_one_source_of_tasks(args: argparse.Namespace) -> None:
    require(not (args.tasks and args.suite), f"--suite {args.suite} brings its own tasks: leave --tasks {args.tasks} out")
    require(not (args.perplexity and args.dataset), "--perplexity and --dataset both name the text: give one of them")
    require(not args.champion or args.mlflow is not None, "--champion NAME is looked up in MLflow: add --mlflow [URI]")


def _repeat(args: argparse.Namespace) -> None:
    """Run an evaluation of MLflow again, and say what differs; exit code 1 where the numbers do."""
    uri = tracking.default_uri(TrackingConfig(uri=args.mlflow or None))
    tracking.check_server(uri)
    args.mlflow = None  # the repetition is compared, and not tracked
    with tempfile.TemporaryDirectory() as folder:
        earlier = tracking.fetch_evaluation(args.repeat, folder)
        from a2d_core.stages import repeat

        output_dir = checks.output_directory(args.output_dir, overwrite=args.overwrite, inputs=tuple(filter(None, [args.model])))
        result, surroundings, outcome = repeat.run(earlier, output_dir, model_dir=args.model)
    _tell_evaluation(result, output_dir)
    for title, differences in (("settings, versions or weights differ", surroundings), ("results differ", outcome)):
        if differences:
            print(f"\n{title}:", *differences[:20], *([f"and {len(differences) - 20} more"] if len(differences) > 20 else []), sep="\n  ")
    if outcome:
        print(f"\nnot equal: {len(outcome)} numbers or answers of run {args.repeat} came out otherwise")
        raise SystemExit(1)
    print(f"\nequal: every number and every answer of run {args.repeat} came out again, to the last bit")


def _tell_evaluation(result: dict[str, Any], output_dir: Path) -> None:
    for row in result["tasks"]:
        told = [(name, row[name]) for name in ("chance", "baseline", "champion", "published") if row[name] is not None]
        aside = "".join(f", {name} {value:.3f}" for name, value in told) + (f", {row['failed']} failed" if row["failed"] else "")
        name, stderr = row["entry"] or row["task"], row["stderr"] or 0
        print(f"{name:<24} {row['metric']:<14} {row['value']:.3f} ± {stderr:.3f} ({row['documents']} documents{aside})")
    for row in result["frontier"]:
        pace = f"{row['tokens'] / row['evaluations']:.2f} tokens per evaluation" if row["evaluations"] else ""
        print(f"{row['sampler']:<24} {row['task']:<24} {row['value']:.3f} ± {row['stderr'] or 0:.3f}  {pace}")
    if result["text"]:
        _tell(result["text"])
    print(f"\nthe results are in {output_dir}/results.json; {output_dir}/report.html shows them")


def list_suites(args: argparse.Namespace) -> None:
    """List the suites, or the entries of one."""
    if not args.name:
        _list({name: suites.read(name, args.objective).summary for name in suites.names()})
        return
    for entry in suites.read(args.name, args.objective).entries:
        published = "" if entry.published is None else f"  published {entry.published:.3f}"
        shots = "" if entry.num_fewshot is None else f"  {entry.num_fewshot} shots"
        print(f"{entry.name:<18} {entry.task:<20} {entry.metric or '':<30}{shots}{published}")
        for text in (json.dumps(entry.sample) if entry.sample else "the recipe's sampler", entry.note):
            print(f"{'':<18} {text}" if text else "", end="\n" if text else "")


def export(args: argparse.Namespace) -> None:
    """Write a checkpoint in the published A2D format."""
    output_dir = checks.output_directory(args.output_dir, overwrite=args.overwrite, inputs=(args.model,))
    from a2d_core import models

    models.load(args.model, objective=args.objective, device="cpu").export(output_dir)
    print(f"{output_dir} is in the published A2D format")


def merge(args: argparse.Namespace) -> None:
    """Merge LoRA adapters into the model that they were trained on."""
    require((Path(args.model) / "adapter_config.json").is_file(), f"'{args.model}' holds no LoRA adapters: there is nothing to merge")
    from a2d_core import models

    model = models.load(args.model, base=args.base, device="cpu")
    inputs = (args.model, *filter(None, [args.base]))
    output_dir = checks.output_directory(args.output_dir, overwrite=args.overwrite, inputs=inputs)
    model.save(output_dir)
    print(f"the checkpoint is {output_dir}: try it with  python -m a2d_core chat --model {output_dir}")


def lm_eval(args: argparse.Namespace) -> None:
    """Run lm-eval's own command."""
    from lm_eval.__main__ import cli_evaluate

    from a2d_core import harness  # noqa: F401  it registers the models

    sys.argv = ["lm-eval", *args.arguments]
    cli_evaluate()


def plan(args: argparse.Namespace) -> None:
    """Print a resolved recipe, which `--preset FILE.json` reads back, and then what it would cost."""
    from a2d_core import plan as costs

    recipe = presets.resolve(presets.read(args.preset), args.objective, args.overrides, args.seed)
    plain = {key: value for key, value in to_dict(recipe).items() if key != "objective"}
    cost = costs.estimate(recipe)
    if args.json:
        print(json.dumps({"recipe": plain, "cost": cost}, indent=2))
    else:
        print(json.dumps(plain, indent=2), costs.text(cost), sep="\n\n")


def registry(args: argparse.Namespace) -> None:
    """Review a version, or decide on it."""
    from a2d_core import registry as models
    from a2d_core import review

    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    uri = tracking.default_uri(TrackingConfig(uri=args.mlflow))
    there = not uri.startswith("sqlite:///") or Path(uri.removeprefix("sqlite:///")).is_file()  # MLflow would make a new one
    require(there, f"there is no MLflow database {uri}: name the server or the database with --mlflow URI or MLFLOW_TRACKING_URI")
    tracking.check_server(uri)
    if args.verb == "review":
        found = review.build(models.read(args.name, args.version), models.champion(args.name))
        print(json.dumps(found, indent=2) if args.json else review.text(found))
    elif args.verb == "promote":
        print(models.promote(args.name, args.version, force=args.force, why=args.why))
    elif args.verb == "rollback":
        print(models.rollback(args.name, args.why))
    else:
        print({"approve": models.approve, "reject": models.reject}[args.verb](args.name, args.version, args.why))


def list_presets(args: argparse.Namespace) -> None:
    """List the presets."""
    _list({name: presets.summary(name) for name in presets.names()})


# --- what they share ------------------------------------------------------------------------------


def _option(field: str, value: Any) -> str | None:
    """An option of the command line as an override, which `--set` may override in turn."""
    return None if value is None else f"{field}={json.dumps(value)}"


def _resolve(args: argparse.Namespace, objective: str, options: Sequence[str | None], block_size: int | None = None) -> Recipe:
    """The recipe of this command: the preset's tables for the stages that it runs, the other stages switched off."""
    overrides = [*filter(None, options), *(_complete(text, args.command) for text in args.overrides)]
    values = presets.flatten(presets.read(args.preset), objective, overrides, args.seed)
    if args.command != "convert":
        values["convert"] = {} if block_size is None else {"block_size": block_size}
    for stage in STAGES[1:]:
        if stage not in USES[args.command]:
            values[stage] = {"enabled": False}
    return build(Recipe, values)


def _complete(text: str, command: str) -> str:
    """`field=value` with its stage in front; a field that this command does not read is refused."""
    uses, (path, _) = USES[command], parse_override(text)
    text = text if len(path) > 1 else f"{uses[0]}.{text.strip()}"
    stage, field = parse_override(text)[0][:2]
    require(stage in uses, f"--set {text}: this command reads the fields of {' and '.join(uses)}, not of '{stage}'")
    unread = {**UNREAD.get(command, {}), f"{stage}.enabled": "the command itself says what runs"}
    require(
        f"{stage}.{field}" not in unread, f"--set {text}: this command does not read {stage}.{field} ({unread.get(f'{stage}.{field}')})"
    )
    return text


def _resolve_for_model(args: argparse.Namespace, options: Sequence[str | None]) -> Recipe:
    """The recipe for a checkpoint, whose directory tells the objective and the block size."""
    if args.model.startswith("models:/"):
        args.model = tracking.checkpoint_of(args.model, TrackingConfig(uri=args.mlflow or None))
    model = Path(args.model)
    spec = checks.read_spec(model)
    if spec is None:
        advice = f"convert it first: python -m a2d_core convert --model {model} --output-dir DIR"
        require(not model.is_dir(), f"'{model}' is not a diffusion checkpoint (no 'a2d' entry in its config.json): {advice}")
        require(
            bool(args.objective), f"there is no directory '{model}': give a checkpoint directory; for a model on the Hub, add --objective"
        )
        return _resolve(args, args.objective, options)
    objective = spec["objective"] or args.objective
    require(
        bool(objective),
        f"'{model}' does not say what it was trained for: add --objective {' or --objective '.join(OBJECTIVES)}",
    )
    require(
        args.objective in (None, objective),
        f"--objective {args.objective}: '{model}' is a checkpoint for {objective}, so leave the option out",
    )
    return _resolve(args, objective, options, spec["block_size"])


@contextmanager
def _work(args: argparse.Namespace, recipe: Recipe, inputs: tuple[str | Path | None, ...]) -> Iterator[Path]:
    """Around the work of a stage: the output directory, advice when memory is full, and MLflow where it was asked for."""
    stage = args.command
    if args.mlflow is not None:
        uri = tracking.default_uri(TrackingConfig(uri=args.mlflow or None))
        tracking.check_server(uri)
    if getattr(args, "output", None) is None:
        given = {"resume": args.resume, "overwrite": args.overwrite, "inputs": tuple(filter(None, inputs))}
        output_dir = checks.output_directory(args.output_dir, **given)
    else:
        output_dir = checks.output_directory(args.output.parent, resume=True)
    with checks.memory_advice(stage, getattr(recipe, stage)):
        if args.mlflow is None:
            yield output_dir
            return
        parent = tracking.start_parent(recipe, name=f"{stage} {output_dir.name}")
        with tracking.stage_run(parent, stage, params=to_dict(getattr(recipe, stage))):
            yield output_dir
        tracking.finish(parent)


def _list(meanings: dict[str, str]) -> None:
    """Print names, and what each means beside them."""
    width = max(map(len, meanings)) + 2
    for name, meaning in meanings.items():
        print(textwrap.fill(meaning, 120, initial_indent=f"{name:<{width}}", subsequent_indent=" " * width, break_on_hyphens=False))


def _tell(result: dict[str, Any]) -> None:
    known = {name: value for name, value in result.items() if value is not None}
    width = max(map(len, known), default=0)
    for name, value in known.items():
        print(f"{name:<{width}}  {f'{value:.4g}' if isinstance(value, float) else value}")
