"""The command line: every stage of the pipeline without Metaflow.

    python -m a2d_core convert --model Qwen/Qwen3-0.6B --objective bd3lm --output-dir runs/converted
    python -m a2d_core sft --model runs/converted --dataset chats.jsonl --output-dir runs/sft
    python -m a2d_core chat --model runs/sft/checkpoint-final

A preset lies underneath; options and `--set field=value` change single fields of it. A mistake of
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
from typing import Any

from a2d_core import commands, launch, tracking
from a2d_core.config import OBJECTIVES, Recipe, StoppedError, UserError, describe
from a2d_core.stages import checks


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return the exit code: 0; 2 for the user's mistakes, 143 after SIGTERM, 1 for what else failed and is explained."""
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
    except (checks.MemoryFullError, launch.WorkerError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


# --- what each command takes ----------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    """The command line's grammar."""
    top = argparse.ArgumentParser(prog="python -m a2d_core", description="Turn an autoregressive language model into a diffusion one.")
    group = top.add_subparsers(title="commands", metavar="COMMAND", required=True)

    convert = _command(group, "convert", "make a diffusion checkpoint of an autoregressive model", commands.convert)
    convert.add_argument("--model", help="Hugging Face directory or Hub id, or 'embedded' for the tiny one (default: the preset's)")
    convert.add_argument(
        "--objective", choices=OBJECTIVES, default="bd3lm", help="bd3lm: block diffusion (default); mdlm: masked diffusion"
    )

    for name, what in (("pretrain", "continue pretraining on text"), ("sft", "fine-tune on conversations")):
        train = _command(group, name, f"{what} with the checkpoint's diffusion objective", commands.train)
        _model(train)
        train.add_argument("--dataset", help="Hub id, file (txt, jsonl, parquet), directory, or 'embedded:...' (default: the preset's)")
        train.add_argument("--processes", type=int, metavar="N", help="processes on this machine, one per GPU (default: the preset's)")
        train.add_argument("--strategy", help="how they share the training: ddp, fsdp2, zero2, or an accelerate configuration (.yaml)")
        train.add_argument("--nodes", type=int, default=1, metavar="M", help="machines, each of which runs this command (default: 1)")
        train.add_argument("--node-rank", type=int, default=0, metavar="R", help="number of this machine, from 0; the only thing to differ")
        train.add_argument("--main-address", metavar="HOST:PORT", help="where the nodes meet: node 0 and a free port there")
        train.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in --output-dir")

    sample = _command(group, "sample", "generate from a fixed set of prompts", commands.sample)
    _model(sample)
    asked = sample.add_mutually_exclusive_group()
    asked.add_argument("--prompt", action="append", metavar="TEXT", help="a prompt; give it again for more (default: the preset's)")
    asked.add_argument(
        "--prompts", type=Path, metavar="FILE", help='prompts, one a line: plain text, or .jsonl with texts or {"prompt": ...}'
    )

    chat = _command(group, "chat", "talk to a model; in a pipe, one line in is one answer out", commands.chat, writes=False)
    _model(chat)
    chat.add_argument(
        "--raw", action="store_true", help="continue plain text, without the chat template (for models that were only pretrained)"
    )
    chat.add_argument(
        "--forget", action="store_true", help="answer each question by itself (for models tuned on single questions, as the tiny one is)"
    )

    evaluate = _command(group, "evaluate", "score on lm-evaluation-harness tasks, and the NELBO of held-out text", commands.evaluate)
    _model(evaluate, required=False)
    evaluate.add_argument("--tasks", metavar="A,B", help="task or group names of lm-eval (default: the preset's)")
    evaluate.add_argument("--suite", metavar="NAME", help="tasks with their own shots and samplers: see 'suites', or a .toml file")
    evaluate.add_argument("--perplexity", metavar="FILE|DATASET", help="score all of this text; without --tasks or --suite it alone")
    evaluate.add_argument(
        "--frontier", action="append", metavar="FIELD=A,B", help="try samplers too: threshold=0.5,0.9, steps_per_block=1,2; repeat at will"
    )
    evaluate.add_argument("--repeat", metavar="RUN_ID", help="run this evaluation of MLflow (--mlflow URI) again, and compare to the bit")
    evaluate.add_argument("--champion", metavar="NAME", help="compare with the champion of this registered model (with --mlflow)")
    evaluate.add_argument("--dataset", help="held-out text: Hub id, file, directory, 'embedded:corpus', or 'none' (default: the preset's)")
    evaluate.add_argument("--baseline", metavar="DIR", help="score this checkpoint too, for comparison: the converted one, say")
    evaluate.add_argument("--processes", type=int, metavar="N", help="processes on this machine, one per GPU (default: the preset's)")
    evaluate.add_argument("--source", metavar="DIR", help="the autoregressive model, for its own loss on the same text")

    merge = group.add_parser(
        "merge", help="merge LoRA adapters into their model", description="Merge LoRA adapters into the model they were trained on."
    )
    merge.add_argument("--model", required=True, metavar="DIR", help="adapters: OUTPUT_DIR/adapter of a training, or its checkpoint-N")
    merge.add_argument("--base", metavar="DIR", help="where the model that they were trained on is now, if it was moved")
    _output(merge)
    merge.set_defaults(run=commands.merge)

    lm_eval = group.add_parser(  # whatever follows is lm-eval's own
        "lm-eval", help="the command lm_eval, with the models a2d_mdlm and a2d_bd3lm", prefix_chars="\0", add_help=False
    )
    lm_eval.add_argument("arguments", nargs="*")
    lm_eval.set_defaults(run=commands.lm_eval)

    plan = group.add_parser(
        "plan", help="print a resolved recipe as JSON, and run nothing", description="Print a resolved recipe, and run nothing."
    )
    plan.add_argument("--objective", choices=OBJECTIVES, default="bd3lm", help="default: bd3lm")
    _recipe_options(plan, "stage.field=value")
    plan.set_defaults(run=commands.plan)
    listing = group.add_parser("presets", help="list the presets", description="List the presets.")
    listing.set_defaults(run=commands.list_presets)
    listed = group.add_parser("suites", help="list the suites of evaluate, or what is in one", description="List the suites.")
    listed.add_argument("name", nargs="?", metavar="NAME", help="show the entries of this one")
    listed.add_argument("--objective", choices=OBJECTIVES, default="bd3lm", help="default: bd3lm")
    listed.set_defaults(run=commands.list_suites)
    return top


def _command(group: Any, name: str, what: str, run: Any, writes: bool = True) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = group.add_parser(
        name,
        help=what,
        description=f"{what[0].upper()}{what[1:]}.",
        epilog=_fields(name),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.set_defaults(run=run, command=name, mlflow=None, resume=False, overwrite=False)
    _recipe_options(command, "field=value")
    if writes:
        _output(command)
        command.add_argument(
            "--mlflow", nargs="?", const="", metavar="URI", help="track in MLflow (without URI: MLFLOW_TRACKING_URI, or ./mlflow.db)"
        )
    return command


def _recipe_options(command: argparse.ArgumentParser, grammar: str) -> None:
    command.add_argument(
        "--preset", default="default", metavar="NAME", help="recipe underneath: a preset (see 'presets'), or a .toml or .json file"
    )
    command.add_argument(
        "--set", action="append", default=[], metavar=grammar.upper(), dest="overrides", help=f"change a field: {grammar}; repeat at will"
    )
    command.add_argument("--seed", type=int, help="seed of everything random (default: the preset's, or 0)")


def _output(command: argparse.ArgumentParser) -> None:
    command.add_argument("--output-dir", required=True, metavar="DIR", help="where the result goes: a new or empty directory")
    command.add_argument("--overwrite", action="store_true", help="replace the earlier output in --output-dir")


def _model(command: argparse.ArgumentParser, required: bool = True) -> None:
    command.add_argument(
        "--model", required=required, metavar="DIR", help="diffusion checkpoint: a directory that convert, pretrain or sft has made"
    )
    command.add_argument("--objective", choices=OBJECTIVES, help="only for a model on the Hub; a directory says what it is")


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
        return "one of " + ", ".join(ast.literal_eval(annotation.removeprefix("Literal")))
    words = {
        "int": "integer",
        "float": "number",
        "str": "text",
        "bool": "true or false",
        "None": "none",
        "tuple[str, ...]": "list of texts",
        "dict[str, str]": "table of texts",
    }
    return " or ".join(words[part] for part in annotation.split(" | "))


if __name__ == "__main__":
    sys.exit(main())
