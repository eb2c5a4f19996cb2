"""The flow as a person runs it: from start to end, killed in sft and resumed, with stages switched off, and refused."""

import base64
import fnmatch
import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FLOW = str(ROOT / "flows" / "a2d_flow.py")
STAGES = ("convert", "pretrain", "sft", "sample", "evaluate", "register")
SFT_STEPS = 400


def command(*arguments, preset="smoke"):
    return [sys.executable, FLOW, *(["--config-value", "preset", preset] if preset else []), *arguments]


def environment(place, **more):
    """That of root on a fresh machine: no user that Metaflow would accept, nothing configured."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("METAFLOW_") and key not in ("USERNAME", "SUDO_USER")}
    mine = {"USER": "root", "OMP_NUM_THREADS": "1", "METAFLOW_DATASTORE_SYSROOT_LOCAL": str(place)}
    return env | mine | {"TMPDIR": str(place)} | more  # a killed run leaves its room behind


def run(place, *arguments, preset="smoke", **more):
    done = subprocess.run(
        command(*arguments, preset=preset), cwd=place, env=environment(place, **more), capture_output=True, text=True, timeout=300
    )
    return done.returncode, done.stdout + done.stderr


def query(place, text):
    with sqlite3.connect(f"file:{place}/mlflow.db?mode=ro", uri=True) as database:
        return database.execute(text).fetchall()


def has_stored(place, step, pattern):
    """Whether a step has stored a file of that name; what is deleted meanwhile does no harm, as it would to `rglob`."""
    return any(step in Path(folder).parts and fnmatch.filter(names, pattern) for folder, _, names in os.walk(place))


@dataclass(frozen=True)
class Killed:
    """A run that SIGKILL ended in sft, once its first training checkpoint was stored, and that was resumed to its end."""

    place: Path
    """Where it ran; `killed.log` is what it printed until then."""
    run_id: str
    parent: str
    """Its MLflow run, as the killed run left it."""
    resumed_id: str
    output: str
    """What `resume` printed."""


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """What all tests of this run look at, and none changes."""
    place = tmp_path_factory.mktemp("flow")
    overrides = f"pretrain.max_steps=6 sft.max_steps={SFT_STEPS} sft.save_every=20 sft.eval_every=100 sft.log_every=5"
    with (place / "killed.log").open("w") as log:
        process = subprocess.Popen(
            command("run", "--objective", "bd3lm", "--run-id-file", "killed", "--overrides", overrides),
            cwd=place,
            env=environment(place),
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    deadline = time.monotonic() + 240
    while not has_stored(place, "sft", "0.training.*.metadata"):
        assert process.poll() is None, (place / "killed.log").read_text()
        assert time.monotonic() < deadline, (place / "killed.log").read_text()
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    [(parent,)] = query(place, "select run_uuid from tags where key = 'metaflow.run'")
    code, output = run(place, "resume", "--origin-run-id", (place / "killed").read_text(), "--run-id-file", "resumed", preset=None)
    assert code == 0, output
    return Killed(place, (place / "killed").read_text(), parent, (place / "resumed").read_text(), output)


def test_the_bare_command_works_for_root(killed):
    assert "executing A2DFlow for user:a2d" in (killed.place / "killed.log").read_text()


def test_a_killed_run_goes_on_from_its_last_checkpoint(killed):
    [line] = [line for line in killed.output.splitlines() if "sft goes on from step" in line]
    assert 20 <= int(line.split()[-1]) < SFT_STEPS


def test_a_resumed_run_goes_on_in_the_same_mlflow_runs(killed):
    children = query(
        killed.place,
        "select r.name, r.status from runs r join tags t using (run_uuid) "
        f"where t.key = 'mlflow.parentRunId' and t.value = '{killed.parent}'",
    )
    assert sorted(children) == sorted((stage, "FINISHED") for stage in STAGES)
    assert query(killed.place, f"select status from runs where run_uuid = '{killed.parent}'") == [("FINISHED",)]


def test_no_step_is_logged_twice_and_none_is_lost(killed):
    assert query(killed.place, "select run_uuid, key, step from metrics group by 1, 2, 3 having count(*) > 1") == []
    steps = query(
        killed.place, "select step from metrics m join runs r using (run_uuid) where r.name = 'sft' and key = 'loss' order by step"
    )
    assert [step for (step,) in steps] == list(range(5, SFT_STEPS + 1, 5))


def test_one_version_is_registered_that_leads_back(killed):
    assert query(killed.place, "select name, version from model_versions") == [("a2d-smoke-bd3lm", 1)]
    tags = dict(query(killed.place, "select key, value from model_version_tags"))
    assert tags["mlflow.parent_run"] == killed.parent
    assert tags["metaflow.run"] == f"A2DFlow/{killed.resumed_id}"
    assert tags["review"] == "pending"
    assert query(killed.place, "select alias, version from registered_model_aliases") == [("candidate", 1)]


def test_training_checkpoints_are_pruned_and_go_when_the_step_is_done(killed):
    kept = [path.parts for path in killed.place.rglob("*.training.*.metadata") if {"metadata", "sft"} <= set(path.parts)]
    assert 1 <= sum(killed.run_id in parts for parts in kept) <= 3  # two, and one more where the kill came between storing and pruning
    assert sum(killed.resumed_id in parts for parts in kept) == 0


def test_the_cards_show_curves_samples_and_scores(killed):
    wanted = {"pretrain": "held-out NELBO", "sft": "held-out NELBO", "sample": "network evaluations", "evaluate": "autoregressive source"}
    for step, text in wanted.items():
        code, output = run(killed.place, "card", "get", f"{killed.resumed_id}/{step}", f"{step}.html", preset=None)
        assert code == 0, output
        [data] = re.findall(r'__MF_DATA__\["[^"]+"\] = "([^"]+)"', (killed.place / f"{step}.html").read_text())
        assert text in base64.b64decode(data).decode()


def test_the_end_says_where_to_look_and_the_model_answers(killed):
    for words in (
        "words_sort",
        "untrained",
        "nats per token",
        f"card server --run-id {killed.resumed_id}",
        f"ui --backend-store-uri sqlite:///{killed.place}/mlflow.db",
    ):
        assert words in killed.output
    [line] = [line for line in killed.output.splitlines() if " -m a2d_core chat " in line]
    chat = line[line.index("PYTHONPATH=") :]
    done = subprocess.run(
        chat,
        shell=True,
        input="Reverse: garden\n",
        cwd=killed.place,
        env=environment(killed.place),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr


def test_a_stage_that_is_switched_off_passes_its_input_through_and_says_so(tmp_path):
    off = [f"{stage}.enabled=false" for stage in ("pretrain", "sft", "sample", "evaluate", "register")]
    code, output = run(tmp_path, "run", "--objective", "mdlm", "--seed", "3", "--export-dir", "out", "--overrides", " ".join(off))
    assert code == 0, output
    for stage in ("pretrain", "sft", "sample", "evaluate", "register"):
        assert f"{stage} is switched off" in output
    [model] = (tmp_path / "out").glob("*/model")
    assert [stage["stage"] for stage in json.loads((model / "config.json").read_text())["a2d"]["chain"]] == ["convert"]
    assert query(tmp_path, "select count(*) from model_versions") == [(0,)]
    assert ("seed", "3") in query(tmp_path, "select key, value from params")


@pytest.mark.parametrize(
    ("arguments", "more", "message"),
    [
        (["run", "--objective", "mdml"], {}, "invalid choice: mdml. (choose from mdlm, bd3lm)"),
        (["run", "--overrides", "sft.max_step=3"], {}, "unknown field 'sft.max_step': did you mean 'max_steps'?"),
        (["run", "--overrides", "sft.max_length=60"], {}, "sft.max_length=60 is not a multiple of convert.block_size=8: use 56"),
        (["run", "--overrides", "compute.train.gpu=8"], {}, "compute.train cannot be changed by an override"),
        (["run", "--overrides", "register.name=a/b"], {}, "register.name='a/b'"),
        (["run", "--export-dir", "/proc/nowhere"], {}, "cannot write to output directory '/proc/nowhere/"),
        (["run", "--overrides", "sft.dataset=missing.jsonl"], {}, "'missing.jsonl' does not exist"),
        (["run", "--overrides", "evaluate.tasks=gsm9k"], {}, "gsm9k"),
        (["run"], {"MLFLOW_TRACKING_URI": "http://127.0.0.1:9"}, "MLflow does not answer at http://127.0.0.1:9"),
    ],
)
def test_a_mistake_is_told_before_any_work_and_without_a_traceback(arguments, more, message, tmp_path):
    code, output = run(tmp_path, *arguments, **more)
    assert code != 0
    assert message in output
    assert "Traceback" not in output
    assert "convert/2" not in output


def test_a_mistake_in_the_preset_is_told_before_the_flow_is_built(tmp_path):
    code, output = run(tmp_path, "run", preset="tinny")
    assert (code, "did you mean 'tiny'?" in output, "Traceback" in output) == (1, True, False)
    (tmp_path / "mine.toml").write_text('base = "smoke"\n[compute.train]\ngpus = 8\n')
    code, output = run(tmp_path, "show", preset="mine.toml")
    assert (code, "unknown field 'compute.train.gpus'" in output, "Traceback" in output) == (1, True, False)


def test_show_reads_like_documentation(tmp_path):
    code, output = run(tmp_path, "show")
    assert code == 0
    for number, step in enumerate(("start", *STAGES, "end"), 1):
        assert f"{number}. {step}:" in output
    code, output = run(tmp_path, "run", "--help")
    assert "bd3lm (block diffusion) or mdlm (masked diffusion)" in " ".join(output.split())
