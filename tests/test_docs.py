"""The docs against the code: every command is read by the real parsers, run, or marked; every message and every field is the code's."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import pytest

from a2d_core import commands, embedded, presets
from a2d_core.__main__ import parser
from a2d_core.config import OBJECTIVES

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "infra" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MARK = re.compile(r"#.*needs (?:a GPU|a cluster|a Kubernetes cluster|Docker)")
OURS = ("python", "make", "mlflow")
NOT_OURS = {"docker", "kubectl", "aws", "helm", "pip", "source", "curl", "echo", "export", "metaflow"}
"""Programs of others, which can be neither read nor run here; where they need more than a laptop, their names say so."""
METAFLOW = {"--config", "--config-value", "--origin-run-id", "--run-id", "--with", "--datastore", "--environment", "--max-workers"}
OWN_MODEL = ("--model my-model ", "--dataset chats.jsonl --output-dir out/sft", "chat --model out/sft/checkpoint-final")


def lines_of(page: Path) -> Iterator[str]:
    """Command lines of a page: all of a block `bash`, and of a block without a language those that begin with a program."""
    for language, block in re.findall(r"```(\w*)\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            program = (line.split() or [""])[0]
            if (language in ("bash", "sh") and program and program != "#") or (not language and program in NOT_OURS.union(OURS)):
                yield line.strip()


COMMANDS = [(page, line) for page in PAGES for line in lines_of(page)]
SHORTENED = " ..."


def words_of(line: str) -> list[str]:
    """The words of the last command of a pipe, without placeholders in brackets and settings before it."""
    words = shlex.split(line, comments=True)
    words = words[len(words) - words[::-1].index("|") :] if "|" in words else words
    return [word for word in words if word != SHORTENED.strip()][sum(bool(re.fullmatch(r"[A-Z_]+=\S*", word)) for word in words[:3]) :]


@pytest.mark.parametrize(("page", "line"), COMMANDS, ids=[f"{page.name}: {line[:60]}" for page, line in COMMANDS])
def test_a_command_is_read_by_its_own_parser(page: Path, line: str) -> None:
    program, *words = words_of(line)
    program = Path(program).name
    if program == "make":
        assert all(re.search(rf"^{word}:", (ROOT / "Makefile").read_text(), re.MULTILINE) for word in words if "=" not in word)
    elif program == "mlflow":
        mlflow(words)
    elif program == "python" and words[:2] == ["-m", "a2d_core"]:
        a2d_core(words[2:], is_shortened=SHORTENED in line)
    elif program == "python" and words[0].endswith("a2d_flow.py"):
        flow(words[1:], line)
    elif program == "python":
        script(words)
    else:
        assert program in NOT_OURS or MARK.search(line), f"{page.name}: no test knows what '{program}' is: mark the line"


def a2d_core(words: list[str], *, is_shortened: bool) -> None:
    """The parser takes it, and its preset and fields exist."""
    if is_shortened:
        words = [*words, *(["--model", "x", "--output-dir", "y"] if "--model" not in words else [])]
    try:
        args = parser().parse_args(words)
    except SystemExit as error:
        pytest.fail(f"the parser refuses it: {error}")
    if getattr(args, "preset", "default") not in presets.names():
        assert args.preset.endswith((".toml", ".json"))
        return
    overrides = getattr(args, "overrides", [])
    completed = [commands._complete(text, args.command) for text in overrides] if hasattr(args, "command") else overrides
    if overrides and hasattr(args, "preset"):
        presets.resolve(presets.read(args.preset), args.objective or "bd3lm", completed)


def flow(words: list[str], line: str) -> None:
    """Its options are parameters of the flow or of Metaflow, and its preset and overrides resolve."""
    code = (ROOT / "flows" / "a2d_flow.py").read_text()
    own = {f"--{name}" for name in re.findall(r'= (?:Parameter|Config)\("([\w-]+)"', code)}
    assert own >= {"--preset", "--objective"}
    verb = next(word for word in words if word in ("show", "run", "resume", "card", "check", "argo-workflows", "step-functions"))
    given = dict(pairwise(words))
    unknown = {word for word in words if word.startswith("--")} - own - METAFLOW
    assert not unknown, f"{unknown}: neither the flow's nor Metaflow's"
    name = words[words.index("preset") + 1] if "preset" in words else "tiny"
    if name in presets.names() and verb == "run":
        for objective in [given["--objective"]] if "--objective" in given else OBJECTIVES:
            recipe = presets.resolve(presets.read(name), objective, given.get("--overrides", "").split())
            assert recipe.compute.platform == "local" or MARK.search(line), f"{name} runs on {recipe.compute.platform}: mark the line"
            assert recipe.compute.train.gpu == 0 or MARK.search(line), f"{name} takes GPUs: mark the line"
    else:
        assert verb != "run" or name.endswith((".toml", ".json")), f"no preset '{name}'"


def script(words: list[str]) -> None:
    """The file exists, and names the options."""
    if words[:2] == ["-m", "pytest"]:
        assert all((ROOT / word).exists() for word in words[2:] if not word.startswith("-"))
        return
    code = (ROOT / words[0]).read_text()
    assert all(word.partition("=")[0] in code for word in words[1:] if word.startswith("--"))


def mlflow(words: list[str]) -> None:
    """MLflow's own command line takes it."""
    import click
    from mlflow.cli import cli

    command, words = cli, list(words)
    while isinstance(command, click.Group):
        name = words.pop(0)
        found = command.get_command(click.Context(command), name)
        assert found is not None, f"mlflow has no command {name}"
        command = found
    command.make_context(name, words)


def test_the_three_commands_for_a_model_of_ones_own_lead_to_an_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [
        line for page, line in COMMANDS if page.name == "TUTORIAL.md" and any(part in line for part in OWN_MODEL) and "--set" not in line
    ]
    steps = [line for line in lines if "--processes" not in line]
    assert [words_of(line)[3] for line in steps] == ["convert", "sft", "chat"]
    (tmp_path / "my-model").symlink_to(embedded.build_base("smoke"))
    rows = embedded.instructions("train", 60)
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps({"messages": row["messages"]}) + "\n" for row in rows))
    small = {"convert": "block_size=8", "sft": "max_length=64 max_steps=2 batch_size=4", "chat": "max_new_tokens=8"}
    for line in steps:
        words = [sys.executable, *words_of(line)[1:]]
        words += [word for field in small[words[3]].split() for word in ("--set", field)]
        done = subprocess.run(words, cwd=tmp_path, input="Reverse: sea\n", capture_output=True, text=True, timeout=300, env=environment())
        assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    assert done.stdout.endswith("\n")


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


# --- the messages ---------------------------------------------------------------------------------


def messages_of_the_code() -> list[str]:
    """Every text in the code, with a mark in the place of each value."""
    found = (ROOT / "Makefile").read_text().replace('" + ', "\0").replace('" if', "\0").splitlines()
    for path in (path for folder in ("a2d_core", "flows") for path in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(part.value if isinstance(part, ast.Constant) else "\0" for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value.replace("%s", "\0"))
    return found


TEXTS = messages_of_the_code()
TROUBLES = re.findall(r"^\| `(.*?)` \|", (ROOT / "docs" / "TROUBLESHOOTING.md").read_text(encoding="utf-8"), re.MULTILINE)


@pytest.mark.parametrize("message", TROUBLES)
def test_a_message_of_the_troubleshooting_page_is_in_the_code(message: str) -> None:
    parts = [part for part in message.split("…") if part.strip(" .:;,'()")]
    assert sum(map(len, parts)) >= 12, "too little of the message is fixed to know it by"
    pattern = re.compile(".*".join(map(re.escape, parts)), re.DOTALL)
    assert any(pattern.search(text) for text in TEXTS)


# --- what is generated, and what is linked --------------------------------------------------------


def tool(name: str) -> ModuleType:
    """A module of tools/, which is no package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_pictures_of_who_sees_whom_have_a_name_for_each_row_and_column() -> None:
    for mask, rows, columns in tool("pictures").views().values():
        assert mask.shape == (len(rows), len(columns))


def test_the_reference_is_up_to_date() -> None:
    assert (ROOT / "docs" / "REFERENCE.md").read_text(encoding="utf-8") == tool("reference").page(), "run python tools/reference.py"


def anchors(page: Path) -> set[str]:
    """The addresses of a page's headings, as GitHub makes them."""
    heads = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=lambda page: page.name)
def test_every_link_to_a_file_or_a_heading_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            path, _, anchor = target.partition("#")
            file = (page.parent / path).resolve() if path else page
            assert file.exists(), target
            assert not anchor or anchor in anchors(file), target


def test_the_architecture_names_every_room_of_the_layers() -> None:
    spec = importlib.util.spec_from_file_location("layers", ROOT / "tests" / "test_layers.py")
    assert spec is not None and spec.loader is not None
    layers = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(layers)
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    drawn = text[text.index("__main__ ") : text.index("- The **numeric core**")].split("```")[0]
    rooms = re.findall(r"\w+", drawn)
    assert not {room for room in layers.ORDER if room != "sandbox_child"} - set(rooms)
    lines = [set(re.findall(r"\w+", line)) for line in drawn.splitlines() if line.strip()]
    placed = [next(number for number, line in enumerate(lines[::-1]) if room in line) for room in layers.ORDER if room != "sandbox_child"]
    assert placed == sorted(placed)
