"""The flow's training on several nodes: the graph, the same losses as one process, and a node that is killed."""

import json
import os
import re
import signal
import subprocess
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from test_flow import command, environment, has_stored, query, run
from test_launch import _alive, _until

from a2d_core import presets
from a2d_core.stages import convert, pretrain

PRESET = """
base = "smoke"
[pretrain]
precision = "float32"
batch_size = 2
max_steps = {steps}
save_every = {every}
eval_every = {every}
[sft]
enabled = false
[sample]
enabled = false
[evaluate]
enabled = false
[register]
enabled = false
[compute.train]
nodes = 2
{compute}
"""


def write_preset(place, **values):
    (place / "nodes.toml").write_text(PRESET.format(**values))


def test_several_nodes_change_the_graph_and_one_does_not(tmp_path):
    write_preset(tmp_path, steps=4, every=2, compute="")
    shown = {preset: run(tmp_path, "show", preset=preset)[1] for preset in ("smoke", "nodes.toml")}
    graphs = {preset: re.findall(r"^Step (\w+)[\s\S]*?(?:=> (\w+)|\Z)", text, re.MULTILINE) for preset, text in shown.items()}
    line = ["start", "convert", "pretrain", "sft", "sample", "evaluate", "register", "end"]
    assert [step for step, _ in graphs["smoke"]] == line
    assert dict(graphs["nodes.toml"]) == dict(zip(line, [*line[1:], ""], strict=True)) | {
        "pretrain": "pretrain_on_nodes", "pretrain_on_nodes": "pretrained_by_nodes", "pretrained_by_nodes": "sft",
        "sft": "sft_on_nodes", "sft_on_nodes": "tuned_by_nodes", "tuned_by_nodes": "sample",
    }  # fmt: skip
    code, output = run(tmp_path, "run", "--overrides", "compute.train.nodes=2")
    assert code != 0 and "compute.train cannot be changed by an override" in output


def test_two_nodes_of_two_processes_equal_one_process(tmp_path):
    write_preset(tmp_path, steps=4, every=2, compute="processes = 2")
    code, output = run(tmp_path, "run", "--objective", "bd3lm", preset="nodes.toml")
    assert code == 0, output
    assert output.count("sft is switched off") == 1  # node 0 says so
    recipe = presets.resolve(presets.read(str(tmp_path / "nodes.toml")), "bd3lm")
    convert.run(recipe.convert, "bd3lm", tmp_path / "converted", seed=recipe.seed)
    pretrain.run(replace(recipe.pretrain, batch_size=8), tmp_path / "converted", tmp_path / "one", seed=recipe.seed)
    assert len(tracked(tmp_path, "loss")) == 4
    for key in ("loss", "eval_nelbo"):
        assert tracked(tmp_path, key) == pytest.approx(dict(rows(tmp_path / "one", key)), rel=1e-5)


def tracked(place, key):
    """Step -> value of a metric of pretraining, as MLflow has it."""
    where = f"from metrics m join runs r using (run_uuid) where r.name = 'pretrain' and key = '{key}'"
    return dict(query(place, f"select step, value {where}"))


def rows(output, key):
    """(step, value) of a metric of a training."""
    for line in (output / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        if key in row:
            yield row["step"], row[key]


STEPS = 240


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="the processes are found through /proc")
def test_a_killed_node_fails_the_attempt_and_the_next_goes_on_from_what_all_nodes_have_stored(tmp_path):
    write_preset(tmp_path, steps=STEPS, every=20, compute='strategy = "fsdp2"\nretries = 1\nminutes_between_retries = 0')
    with (tmp_path / "log").open("w") as log:
        flow = subprocess.Popen(
            command("run", "--run-id-file", "killed", preset="nodes.toml"), cwd=tmp_path, env=environment(tmp_path), stdout=log,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    try:
        seen = {}
        for attempt in (0, 1):
            wanted = [f"{attempt}.training{part}.*.metadata" for part in ("", "-1")]
            _until(
                lambda wanted=wanted: all(has_stored(tmp_path, "pretrain_on_nodes", name) for name in wanted) or flow.poll() is not None,
                seconds=240,
            )
            assert flow.poll() is None, (tmp_path / "log").read_text()
            now = processes_of(tmp_path)
            [node_1] = [pid for pid, line in now.items() if " step pretrain_on_nodes " in line and "_node_1 " in line]
            seen |= now
            os.kill(node_1, signal.SIGKILL)
        assert flow.wait(120) != 0
        output = (tmp_path / "log").read_text()
        assert output.count("node 1 of 2 (0 to 1) is lost: its process ended") >= 2
        assert "Traceback" not in output
        _until(lambda: not any(_alive(pid) for pid in seen), seconds=10)
    finally:
        for pid in processes_of(tmp_path):
            os.kill(pid, signal.SIGKILL)

    code, resumed = run(tmp_path, "resume", "--origin-run-id", (tmp_path / "killed").read_text(), preset=None)
    assert code == 0, resumed
    begun = [int(step) for step in re.findall(r"pretrain (?:goes on from|starts at) step (\d+)", output + resumed)]
    assert len(begun) == 3
    assert 0 == begun[0] < begun[1] < begun[2] < STEPS
    assert sorted(tracked(tmp_path, "loss")) == list(range(1, STEPS + 1))


def processes_of(place: Path) -> dict[int, str]:
    """Process id -> command line of all that was started with this directory for its temporary files."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended meanwhile
            if f"TMPDIR={place}\0".encode() in (process / "environ").read_bytes():
                found[int(process.name)] = (process / "cmdline").read_text().replace("\0", " ")
    return found
