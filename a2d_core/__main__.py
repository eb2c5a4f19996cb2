"""The command line: every stage of the pipeline without Metaflow.

    python -m a2d_core convert --model Qwen/Qwen3-0.6B --objective bd3lm --output-dir runs/converted
    python -m a2d_core sft --model runs/converted --dataset chats.jsonl --output-dir runs/sft
    python -m a2d_core chat --model runs/sft/checkpoint-final

Each command starts from a preset; options and `--set field=value` change single fields of it. A mistake of
the user's ends with one message and exit code 2, before any work.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import json
import os
import signal
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from a2d_core import commands, launch, tracking
from a2d_core.config import OBJECTIVES, Recipe, StoppedError, UserError
from a2d_core.settings import describe, meant
from a2d_core.stages import checks

RESUMES = ("pretrain", "sft", "sample")
"""Commands that continue where they were stopped."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return the exit code: 0, 2 for the user's mistakes, 130 after Ctrl-C, 143 after SIGTERM, 1 for other errors."""
    args = parser().parse_args(arguments)
    tracking.quiet()
    launch.calm_threads()
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # progress bars are for people
    try:
        args.run(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except StoppedError as error:
        print(error, file=sys.stderr)
        return 128 + signal.SIGTERM
    except KeyboardInterrupt:
        remedy = ": the same command with --resume continues" if vars(args).get("command") in RESUMES else ""
        print(f"\nstopped{remedy}", file=sys.stderr)
        return 128 + signal.SIGINT
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("a2d_core"):
            raise
        print(f"error: {error}: install requirements.txt, or activate its environment: source .venv/bin/activate", file=sys.stderr)
        return 1
    except (checks.MemoryFullError, launch.WorkerError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


# --- what each command takes ----------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """A parser that tells a mistake in one line, and which option was probably meant."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Refuse a misspelt option before it is taken for a missing one."""
        options = list(self._option_string_actions)
        for word in args or () if self._subparsers is None and self.prefix_chars == "-" else ():
            name = word.partition("=")[0]
            is_option = name.startswith("--") and " " not in word
            if is_option and not any(option.startswith(name) for option in options):
                self.error(f"unknown option '{name}': {meant(name, options)}")
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Leave with exit code 2."""
        self.exit(2, f"error: {message} (see {self.prog} --help)\n")


def parser() -> argparse.ArgumentParser:
    """The command line's grammar."""
    top = _Parser(prog="python -m a2d_core", description="Turn an autoregressive language model into a diffusion one.")
    group = top.add_subparsers(title="commands", metavar="COMMAND", required=True)

    convert = _command(group, "convert", "make a diffusion checkpoint of an autoregressive model", commands.convert)
    convert.add_argument("--model", help="Hugging Face directory or Hub id, or 'embedded' for the tiny one (default: the preset's)")
    convert.add_argument(
        "--objective", choices=OBJECTIVES, default="bd3lm", help="bd3lm: block diffusion (default); mdlm: masked diffusion"
    )

    for name, what in (("pretrain", "continue pretraining on text"), ("sft", "fine-tune on conversations")):
        train = _command(group, name, f"{what} with the checkpoint's diffusion objective", commands.train)
        _model(train)
        train.add_argument(
            "--dataset", help="Hub id, file (txt, jsonl, json, parquet, csv), directory, or 'embedded:...' (default: the preset's)"
        )
        train.add_argument("--processes", type=int, metavar="N", help="processes on this machine, one per GPU (default: the preset's)")
        train.add_argument(
            "--strategy", help="how the processes share the training: ddp, fsdp2, zero2, or an accelerate configuration (.yaml)"
        )
        train.add_argument("--nodes", type=int, default=1, metavar="M", help="machines, each of which runs this command (default: 1)")
        train.add_argument(
            "--node-rank",
            type=int,
            default=0,
            metavar="R",
            help="number of this machine, from 0: the only option in which the commands differ",
        )
        train.add_argument("--main-address", metavar="HOST:PORT", help="where the nodes meet: the address of node 0, and a free port there")
        train.add_argument("--resume", action="store_true", help="continue from the newest checkpoint in --output-dir")

    sample = _command(group, "sample", "answer a list of prompts", commands.sample, writes=False)
    _model(sample)
    asked = sample.add_mutually_exclusive_group()
    asked.add_argument("--prompt", action="append", metavar="TEXT", help="a prompt; repeat the option for more (default: the preset's)")
    asked.add_argument(
        "--prompts", type=Path, metavar="FILE",
        help='prompts, one per line: plain text, or .jsonl with {"prompt": ...} or {"messages": [...]}, whose other fields are kept',
    )  # fmt: skip
    place = sample.add_mutually_exclusive_group(required=True)
    place.add_argument("--output-dir", metavar="DIR", help="where to write samples.jsonl: a new or empty directory")
    place.add_argument("--output", type=Path, metavar="FILE", help="or the file to write, ending in .jsonl")
    sample.add_argument("--resume", action="store_true", help="continue: skip prompts whose answers are already in the output")
    sample.add_argument("--overwrite", action="store_true", help="replace the earlier output")
    sample.add_argument(
        "--infill", action="store_true", help="fill the gaps <mask:5> (five tokens) or <mask:2-8> (two to eight) of the prompts"
    )
    sample.add_argument(
        "--animate", type=Path, metavar="FILE", help="write a page (.html) that replays how the first prompts were answered"
    )
    _mlflow(sample)

    chat = _command(group, "chat", "talk to a model; in a pipe, each line of input gets one answer", commands.chat, writes=False)
    _model(chat)
    chat.add_argument(
        "--raw", action="store_true", help="continue plain text, without the chat template (for models that were only pretrained)"
    )
    chat.add_argument(
        "--forget", action="store_true", help="answer each question by itself (for models tuned on single questions, like the tiny one)"
    )
    chat.add_argument("--system", default="", metavar="TEXT", help="system prompt: what to tell the model before the conversation")
    chat.add_argument(
        "--pace", type=float, default=0.0, metavar="SECONDS", help="show each evaluation for this long, to watch a fast model (terminal)"
    )

    evaluate = _command(group, "evaluate", "score on lm-evaluation-harness tasks, and the NELBO of held-out text", commands.evaluate)
    _model(evaluate, required=False)
    evaluate.add_argument("--tasks", metavar="A,B", help="task or group names of lm-eval (default: the preset's)")
    evaluate.add_argument("--suite", metavar="NAME", help="tasks with their own shots and samplers: a name (see 'suites') or a .toml file")
    evaluate.add_argument(
        "--perplexity", metavar="FILE|DATASET", help="score all of this text, and no tasks unless --tasks or --suite are given too"
    )
    evaluate.add_argument(
        "--frontier",
        action="append",
        metavar="FIELD=A,B",
        help="try further samplers: threshold=0.5,0.9 or steps_per_block=1,2; repeatable",
    )
    evaluate.add_argument("--repeat", metavar="RUN_ID", help="repeat this evaluation of MLflow (--mlflow URI), and compare to the bit")
    evaluate.add_argument("--champion", metavar="NAME", help="compare with the champion of this registered model (with --mlflow)")
    evaluate.add_argument("--dataset", help="held-out text: Hub id, file, directory, 'embedded:corpus', or 'none' (default: the preset's)")
    evaluate.add_argument("--baseline", metavar="DIR", help="score this checkpoint too, for comparison: for example the converted one")
    evaluate.add_argument("--processes", type=int, metavar="N", help="processes on this machine, one per GPU (default: the preset's)")
    evaluate.add_argument("--source", metavar="DIR", help="the autoregressive model, to compute its own loss on the same text")

    export = _add(group, "export", "write a checkpoint in the published A2D format (a2d-qwen2, a2d-qwen3, a2d-llama)", commands.export)
    _model(export)
    _output(export)

    merge = _add(group, "merge", "merge LoRA adapters into the model they were trained on", commands.merge)
    merge.add_argument("--model", required=True, metavar="DIR", help="adapters: OUTPUT_DIR/adapter of a training, or its checkpoint-N")
    merge.add_argument("--base", metavar="DIR", help="where the model that they were trained on is now, if it has moved")
    _output(merge)

    lm_eval = group.add_parser(  # whatever follows is lm-eval's own
        "lm-eval", help="the command lm_eval, with the models a2d_mdlm and a2d_bd3lm", prefix_chars="\0", add_help=False
    )
    lm_eval.add_argument("arguments", nargs="*")
    lm_eval.set_defaults(run=commands.lm_eval)

    _registry(group)

    plan = _add(group, "plan", "print a resolved recipe, what it would cost and what it would register; run nothing", commands.plan)
    plan.add_argument("--json", action="store_true", help="one JSON object with the keys recipe and cost")
    plan.add_argument("--objective", choices=OBJECTIVES, default="bd3lm", help="default: bd3lm")
    _recipe_options(plan, "stage.field=value")
    _add(group, "presets", "list the presets", commands.list_presets)
    listed = _add(group, "suites", "list the suites of evaluate, or what is in one", commands.list_suites)
    listed.add_argument("name", nargs="?", metavar="NAME", help="show the entries of this one")
    listed.add_argument("--objective", choices=OBJECTIVES, default="bd3lm", help="default: bd3lm")
    return top


def _registry(group: Any) -> None:
    registry = _add(group, "registry", "review the candidate of a registered model, and decide on it")
    verbs = registry.add_subparsers(title="what to do", metavar="VERB", required=True)
    for verb, meaning in {
        "review": "show the candidate against the champion: scores, samples, lineage, configuration",
        "approve": "approve a version",
        "reject": "reject a version; it is no longer the candidate",
        "promote": "make an approved version that passed its gate the champion",
        "rollback": "give the alias champion back to the version that had it before",
    }.items():
        command = _add(verbs, verb, meaning, commands.registry, verb=verb)
        command.add_argument("name", metavar="NAME", help="name of the registered model")
        command.add_argument("--mlflow", metavar="URI", help="where MLflow is (default: MLFLOW_TRACKING_URI, or ./mlflow.db)")
        if verb != "rollback":
            command.add_argument("--version", metavar="N", default="candidate", help="version, by number or alias (default: candidate)")
        if verb == "review":
            command.add_argument("--json", action="store_true", help="print JSON")
        else:
            command.add_argument("--why", metavar="TEXT", required=verb == "reject", help="the reason, which is recorded")
        if verb == "promote":
            command.add_argument("--force", action="store_true", help="promote in spite of the review or the gate; needs --why")


def _add(group: Any, name: str, what: str, run: Any = None, **defaults: Any) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = group.add_parser(name, help=what, description=f"{what[0].upper()}{what[1:]}.")
    command.set_defaults(run=run, **defaults)
    return command


def _command(group: Any, name: str, what: str, run: Any, writes: bool = True) -> argparse.ArgumentParser:
    """A command that runs a stage, with the fields of a recipe for --set."""
    command = _add(group, name, what, run, command=name, mlflow=None, resume=False, overwrite=False)
    command.epilog, command.formatter_class = _fields(name), argparse.RawDescriptionHelpFormatter
    _recipe_options(command, "field=value")
    if writes:
        _output(command)
        _mlflow(command)
    return command


def _mlflow(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--mlflow", nargs="?", const="", metavar="URI", help="track in MLflow (without URI: MLFLOW_TRACKING_URI, or ./mlflow.db)"
    )


def _recipe_options(command: argparse.ArgumentParser, grammar: str) -> None:
    command.add_argument(
        "--preset", default="default", metavar="NAME", help="recipe to start from: a preset (see 'presets'), or a .toml or .json file"
    )
    command.add_argument(
        "--set", action="append", default=[], metavar=grammar.upper(), dest="overrides", help=f"change a field: {grammar}; repeatable"
    )
    command.add_argument("--seed", type=int, help="seed of everything random (default: the preset's, or 0)")


def _output(command: argparse.ArgumentParser) -> None:
    command.add_argument("--output-dir", required=True, metavar="DIR", help="where to write the result: a new or empty directory")
    command.add_argument("--overwrite", action="store_true", help="replace the earlier output in --output-dir")


def _model(command: argparse.ArgumentParser, required: bool = True) -> None:
    command.add_argument(
        "--model", required=required, metavar="DIR",
        help="diffusion checkpoint: a directory made by convert, pretrain or sft, or models:/NAME@ALIAS or models:/NAME/VERSION",
    )  # fmt: skip
    command.add_argument(
        "--objective", choices=OBJECTIVES, help="only for a model that does not record it: one on the Hub, or a published one"
    )


def _fields(command: str) -> str:
    """The table of fields that `--set` takes: name, default, type and meaning."""
    lines = []
    first = commands.USES[command][0]
    for stage in commands.USES[command]:
        default = getattr(Recipe, stage)
        meanings = describe(type(default))
        lines.append(f"fields of {stage}, for --set:")
        for field in dataclasses.fields(default):
            if field.name != "enabled" and f"{stage}.{field.name}" not in commands.UNREAD.get(command, {}):
                name = field.name if stage == first else f"{stage}.{field.name}"
                lines.append(f"  {name}={json.dumps(getattr(default, field.name))}  ({_type_name(str(field.type))})")
                lines += textwrap.wrap(meanings[field.name], 110, initial_indent="      ", subsequent_indent="      ")
        lines.append("")
    return "\n".join(lines)


def _type_name(annotation: str) -> str:
    """A type of config.py in plain words."""
    if annotation.startswith("Literal"):
        choices, _, other = annotation.removeprefix("Literal").partition("] | ")
        listed = ", ".join(ast.literal_eval(choices.rstrip("]") + "]"))
        return f"one of {listed}" + (f" or {_type_name(other)}" if other else "")
    words = {
        "int": "integer",
        "float": "number",
        "str": "text",
        "bool": "true or false",
        "None": "none",
        "tuple[str, ...]": "list of texts",
        "dict[str, str]": "table of texts",
        "tuple[int, ...]": "list of integers",
        "tuple[Toleration, ...]": "list of tolerations",
    }
    return " or ".join(words[part] for part in annotation.split(" | "))


if __name__ == "__main__":
    sys.exit(main())
