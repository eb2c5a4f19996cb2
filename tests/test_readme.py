"""Every command of the README runs, in its order, with the preset `smoke` in the place of `tiny`."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from a2d_core import embedded

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
COMMANDS = [line.strip() for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL) for line in block.splitlines() if line.strip()]
ELSEWHERE = [command for command in COMMANDS if "# needs a" in command]
MADE_HERE = [command for command in COMMANDS if command.startswith("make ")]
HERE = [command for command in COMMANDS if command not in ELSEWHERE + MADE_HERE]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with the checkout's flows, and a model, a text and some conversations of one's own."""
    made = tmp_path_factory.mktemp("readme")
    (made / "my-model").symlink_to(embedded.build_base("smoke"))
    (made / "flows").symlink_to(ROOT / "flows")
    (made / "text.txt").write_text("\n".join(embedded.corpus_split()[1])[:8000])
    (made / "chats.jsonl").write_text(
        "".join(json.dumps({"messages": row["messages"]}) + "\n" for row in embedded.instructions("train", 60))
    )
    return made


def run(command: str, folder: Path) -> str:
    binaries = Path(sys.executable).parent
    environment = {**os.environ, "PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    typed = "Reverse: garden\n"  # what the chat reads
    done = subprocess.run(command, shell=True, cwd=folder, env=environment, input=typed, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def small(command: str, folder: Path) -> str:
    """The command with little work in it."""
    command = command.replace("--preset tiny", "--preset smoke")
    command = command.replace("a2d_flow.py run", "a2d_flow.py --config-value preset smoke run")
    if "RUN_ID" in command:
        command = command.replace("RUN_ID", (folder / ".metaflow" / "A2DFlow" / "latest_run").read_text())
    return command


@pytest.mark.parametrize("command", HERE)
def test_a_command_runs(command: str, folder: Path) -> None:
    run(small(command, folder), folder)


@pytest.mark.parametrize("command", ELSEWHERE)
def test_a_command_for_another_machine_names_a_preset_whose_flow_can_be_built(command: str, folder: Path) -> None:
    cluster = "METAFLOW_DEFAULT_DATASTORE=s3 METAFLOW_DATASTORE_SYSROOT_S3=s3://a-bucket/metaflow "
    assert "Resolve and check the recipe" in run(cluster + command.split(" run ")[0] + " show", folder)


def test_the_python_example_runs(folder: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    (folder / "example.py").write_text(code)
    assert "network evaluations" in run("python example.py", folder)


def test_the_two_commands_do_what_the_readme_says() -> None:
    assert [command.split()[1] for command in MADE_HERE] == ["demo", "test"]
    steps = subprocess.run(["make", "--dry-run", "demo", "test"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "flows/a2d_flow.py run --objective bd3lm" in steps and "-m pytest" in steps


def test_the_presets_and_files_that_the_readme_names_exist() -> None:
    from a2d_core import presets

    tables = re.findall(r"^\| `([\w.-]+)` \|", README, re.MULTILINE)
    assert set(tables) == set(presets.names())
    for path in re.findall(r"^((?:flows|a2d_core|benchmarks|infra|tests)/[\w./]*) ", README, re.MULTILINE):
        assert (ROOT / path).exists(), path
