"""The pipeline as a Metaflow flow: `python flows/a2d_flow.py run --objective bd3lm`."""

from __future__ import annotations

import gc
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if "METAFLOW_EXTRACTED_ROOT" not in os.environ and (ROOT / "a2d_core").is_dir():  # a checkout needs no installation
    sys.path.insert(0, str(ROOT))
if {os.environ.get(name) or "root" for name in ("METAFLOW_USER", "SUDO_USER", "USERNAME", "USER")} == {"root"}:
    os.environ["METAFLOW_USER"] = "a2d"  # Metaflow refuses to work for root

from compute import Compute, check_compute, platform_here, read_preset  # noqa: E402
from metaflow import Config, FlowSpec, Parameter, card, current, step  # noqa: E402
from metaflow._vendor import click  # noqa: E402

from a2d_core import checkpoints, follow, launch, presets, store, tracking  # noqa: E402
from a2d_core.config import OBJECTIVES, Recipe, require  # noqa: E402
from a2d_core.settings import build, to_dict  # noqa: E402

tracking.quiet()
launch.calm_threads()
LOG_NOISE = {"TQDM_DISABLE": "1", "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false", "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true"}
for variable, value in LOG_NOISE.items():  # a step prints into a log, where progress bars are no help
    os.environ.setdefault(variable, value)

OBJECTIVE = click.Choice(OBJECTIVES)
OBJECTIVE.__name__ = "str"  # the name of the type in a deployed workflow


@Compute()
class A2DFlow(FlowSpec):
    """
    Turn an autoregressive language model into a diffusion language model.

    The steps:

    1. start: resolve and check the recipe, reach the MLflow server, and open the run there.
    2. convert: make a diffusion checkpoint of the autoregressive model, and prove that it is one.
    3. pretrain: continue its pretraining on text with the diffusion objective.
    4. sft: fine-tune it on conversations.
    5. sample: let it answer the recipe's prompts.
    6. evaluate: score it with lm-evaluation-harness, and the NELBO of held-out text, beside the untrained checkpoint.
    7. register: put it into the MLflow model registry, as a candidate whose review is pending.
    8. end: export the model, and say where to look.

    Between the steps, artifacts hold numbers and references; the directories lie in the datastore.
    Training is followed live on a card and in MLflow; where MLflow goes away meanwhile, the next step
    sends it what it lacks. A run that fails is continued by `resume`: in the same MLflow run, and from
    the last training checkpoint.
    """

    preset = Config("preset", parser=read_preset, default_value="tiny", help="Recipe: a preset's name, or a path to TOML or JSON.")
    objective = Parameter("objective", default="bd3lm", type=OBJECTIVE, help="bd3lm (block diffusion) or mdlm (masked diffusion).")
    seed = Parameter("seed", type=int, help="Seed of everything random; the preset's own where it is not given.")
    overrides = Parameter("overrides", default="", help="Fields of the recipe to change: 'sft.max_steps=100 sample.temperature=0.7'.")
    export_dir = Parameter("export-dir", default="runs", help="A local run writes its model to EXPORT_DIR/RUN_ID/model.")

    @step
    def start(self) -> None:
        """Resolve and check the recipe, reach the MLflow server, and open the run there."""
        from a2d_core.stages import checks, preflight, register

        # at the spaces before a name: a value may hold some itself
        changes = re.split(r"\s+(?=(?:\w+\.)+\w+=|seed=)", self.overrides.strip()) if self.overrides.strip() else []
        recipe = presets.resolve(self.preset.to_dict(), self.objective, changes, self.seed)
        check_compute(recipe, self.preset.to_dict())
        register.model_name(recipe)
        store.check_datastore(self._datastore.TYPE)
        platform = platform_here(recipe.compute)
        if platform == "local":
            checks.output_directory(Path(self.export_dir) / current.run_id).rmdir()  # it is made again when there is a model
        self.tracking_uri = tracking.default_uri(recipe.tracking)
        require(
            platform == "local" or not self.tracking_uri.startswith(("sqlite:", "file:", "/", ".")),
            f"steps on {platform} cannot share {self.tracking_uri}: give the URI of an MLflow server in tracking.uri",
        )
        tracking.check_server(self.tracking_uri)
        preflight.inputs(recipe)
        self.recipe = to_dict(recipe)
        run = f"{current.flow_name}/{current.run_id}"
        begun = [*([run] if current.retry_count else []), *store.unfinished(current.origin_run_id)]
        self.owed: dict[str, tracking.Owed] = {}
        self.best: dict[str, store.Reference] = {}
        self.mlflow_run = tracking.start_parent(recipe, name=f"{recipe.name}-{recipe.objective}-{current.run_id}", run=run, begun=begun)
        print(f"{recipe.name}, {recipe.objective}, seed {recipe.seed}; MLflow run {self.mlflow_run} at {self.tracking_uri}")
        self.next(self.convert)

    @step
    def convert(self) -> None:
        """Make a diffusion checkpoint of the autoregressive model."""
        from a2d_core.stages import convert, preflight

        with self._stage("convert") as (recipe, room, _):
            numbers = convert.run(recipe.convert, recipe.objective, room / "model", seed=recipe.seed)
            preflight.checkpoint(recipe, room / "model")
            tracking.log_numbers(numbers)
            self.model = self.untrained = store.put_dir(room / "model", "model")
            is_embedded = recipe.convert.model.split(":")[0] == "embedded"
            self.source = store.put_dir(numbers["source"], "source") if is_embedded else None
            self.numbers = {"convert": numbers}
        self.next(self.pretrain)

    @card(type="blank", id="training", refresh_interval=5)
    @step
    def pretrain(self) -> None:
        """Continue the pretraining on text."""
        from a2d_core.stages import pretrain

        self._train("pretrain", pretrain.run)
        self.pretrained = self.model
        self.next(self.sft)

    @card(type="blank", id="training", refresh_interval=5)
    @step
    def sft(self) -> None:
        """Fine-tune on conversations."""
        from a2d_core.stages import sft

        self._train("sft", sft.run)
        self.next(self.sample)

    @card(type="blank", id="samples")
    @step
    def sample(self) -> None:
        """Answer the recipe's prompts."""
        import cards

        self.samples: list[dict[str, Any]] = []
        with self._stage("sample") as (recipe, room, _):
            if self._is_on(recipe.sample, "sample"):
                from a2d_core.stages import sample

                model = store.get_dir(self.model, room / "model")
                self.samples = sample.run(recipe.sample, model, room / "output", seed=recipe.seed)["samples"]
                tracking.log_samples(self.samples)
                print(*cards.sample_lines(self.samples), sep="\n")
            cards.show_samples(current.card["samples"], recipe, self.samples)
        self.next(self.evaluate)

    @card(type="blank", id="evaluation")
    @step
    def evaluate(self) -> None:
        """Score the model, beside the untrained checkpoint and the autoregressive source, and say whether it passes the gate."""
        import cards

        from a2d_core import report
        from a2d_core.stages import register

        self.results: dict[str, Any] | None = None
        blocks = None
        with self._stage("evaluate") as (recipe, room, _):
            if self._is_on(recipe.evaluate, "evaluate"):
                from a2d_core.stages import evaluate

                model = store.get_dir(self.model, room / "model")
                has_baseline = recipe.evaluate.baseline and self.model != self.untrained
                baseline = store.get_dir(self.untrained, room / "baseline") if has_baseline else None
                is_between = self.pretrained not in (self.untrained, self.model)
                pretrained = store.get_dir(self.pretrained, room / "pretrained") if is_between else None
                source = store.get_dir(self.source, room / "source") if self.source else None
                results = evaluate.run(
                    recipe.evaluate,
                    recipe.sample,
                    model,
                    room / "output",
                    seed=recipe.seed,
                    processes=recipe.compute.generate.processes,
                    baseline_dir=baseline,
                    pretrained_dir=pretrained,
                    source_dir=source,
                    champion=tracking.champion_numbers(register.model_name(recipe)),
                )
                tracking.log_evaluation(results, room / "output")
                self.results, blocks = results, report.read(room / "output")
            self.verdict = register.judge(recipe, self.results) if recipe.register.enabled else {}
            if self.verdict:
                print(f"gate: {cards.gate_words(self.verdict)}")
            cards.show_evaluation(current.card["evaluation"], recipe, blocks, self.verdict)
        self.next(self.register)

    @step
    def register(self) -> None:
        """Put the model into the MLflow model registry."""
        from a2d_core.stages import register

        self.registered: dict[str, Any] | None = None
        with self._stage("register") as (recipe, room, _):
            if self._is_on(recipe.register, "register"):
                tags = {"metaflow.run": f"{current.flow_name}/{current.run_id}", "mlflow.parent_run": self.mlflow_run}
                self.registered = register.run(
                    store.get_dir(self.model, room / "model"),
                    recipe,
                    tags=tags | self.verdict,
                    results=self.results,
                    samples=self.samples,
                    facts=self.numbers,
                )
        tracking.finish(self.mlflow_run)  # here, because MLflow is loaded: in a step of its own it would take a second more
        self.next(self.end)

    @step
    def end(self) -> None:
        """Export the model, and say where to look."""
        import cards

        recipe = build(Recipe, self.recipe)
        exported = None
        if platform_here(recipe.compute) == "local":
            exported = store.get_dir(self.model, Path(self.export_dir) / current.run_id / "model")
        print(cards.closing_words(recipe, self.results, self.verdict, self.registered, exported, self.tracking_uri, current.run_id))

    @contextmanager
    def _stage(self, name: str) -> Iterator[tuple[Recipe, Path, str]]:
        """The recipe, a room to work in, and the stage's MLflow run, which is the active one, by its id."""
        from a2d_core.stages import checks

        recipe = build(Recipe, self.recipe)
        config, begun = getattr(recipe, name), time.monotonic()
        tracking.check_server(self.tracking_uri, patience=30)
        tracking.settle(self.mlflow_run, self.owed)
        self.owed = {}
        with (
            tracking.stage_run(self.mlflow_run, name, params=to_dict(config), tags={"metaflow.task": current.pathspec}) as run_id,
            store.workroom(name) as room,
            checks.memory_advice(name, config),
        ):
            store.delete(getattr(self, "spent", []))  # only here: until a training step has ended, a retry goes on from them
            self.spent: list[store.Reference] = []
            yield recipe, room, run_id
        print(f"{name} took {timedelta(seconds=round(time.monotonic() - begun))}")
        gc.freeze()  # the process ends now: to take apart all that it has loaded would cost more than a second

    def _is_on(self, config: Any, name: str) -> bool:
        """Whether a stage is enabled; says so where it is not."""
        if not config.enabled:
            print(f"{name} is switched off ({name}.enabled=false): its input passes through unchanged")
        return config.enabled

    def _train(self, name: str, run: Callable[..., dict[str, Any]], nodes: launch.Nodes = launch.ONE_NODE) -> None:
        """Run a training stage, followed on the card, in MLflow and in the checkpoint store; go on from a checkpoint if there is one."""
        import cards

        if nodes.rank:  # node 0 tracks, and has the weights in the end
            recipe = build(Recipe, self.recipe)
            if getattr(recipe, name).enabled:
                with store.workroom(name) as room:
                    self._fit(name, run, recipe, room, nodes)
            return
        with self._stage(name) as (recipe, room, run_id):
            config = getattr(recipe, name)
            live = cards.TrainingCard(current.card["training"], recipe, name)
            if not self._is_on(config, name):
                return

            numbers, follower = self._fit(name, run, recipe, room, nodes, log=tracking.MetricLog(run_id), on_rows=live.update)
            if why := tracking.refusal(name, numbers, follower.refused):
                self.owed = {name: {"rows": follower.rows, "numbers": numbers}}
                print(f"{name} is done, but MLflow does not take its metrics ({why}): they stay with this step, and the next sends them")
            self.numbers = {**self.numbers, name: numbers}
            self.model = store.put_dir(room / "output" / "checkpoint-final", "model")
            self.spent = store.own("training", nodes.count)
            best = checkpoints.best(room / "output", follower.rows)
            if best and best.name != f"checkpoint-{numbers['steps']}":
                self.best = {**self.best, name: store.put_dir(best, "best", step=int(best.name.removeprefix("checkpoint-")))}
                print(f"the held-out NELBO was lower before the end: {best.name} is kept beside the final model, in the artifact `best`")

    def _fit(
        self, name: str, run: Callable[..., dict[str, Any]], recipe: Recipe, room: Path, nodes: launch.Nodes, **followed: Any
    ) -> tuple[dict[str, Any], follow.Follower]:
        """A training stage's work on this node: from the last checkpoint, which all nodes have stored, to its numbers."""
        config, is_main = getattr(recipe, name), nodes.rank == 0
        lineage = self.model["key"]  # a checkpoint that began at other weights, as before `resume pretrain`, is not gone on from

        def keep(number: int, checkpoint: Path) -> None:
            score = checkpoints.score(checkpoint) if is_main else None
            store.put_dir(checkpoint, store.part("training", nodes.rank), step=number, score=score, lineage=lineage)
            if is_main:
                store.prune("training", keep=config.keep_checkpoints, nodes=nodes.count)

        newest = store.restore("training", room / "output", nodes=nodes.count, lineage=lineage)
        if is_main:
            print(f"{name} goes on from step {newest.name.removeprefix('checkpoint-')}" if newest else f"{name} starts at step 0")
        with follow.Follower(room / "output", on_checkpoint=keep, **followed) as follower:
            numbers = run(
                config,
                store.get_dir(self.model, room / "model"),
                room / "output",
                seed=recipe.seed,
                processes=recipe.compute.train.processes,
                strategy=recipe.compute.train.strategy,
                nodes=nodes,
                resume_from=str(newest) if newest else None,
            )
        return numbers, follower


if __name__ == "__main__":
    A2DFlow()
