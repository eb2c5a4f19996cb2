"""Directories between steps, in a small flow of real tasks: copies, retries, resumed runs, and what is pruned."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

FLOW = """
import json, os
from pathlib import Path
from metaflow import FlowSpec, Parameter, current, retry, step
from a2d_core import store

def directory(text):
    folder = Path("made") / text
    (folder / "deep").mkdir(parents=True, exist_ok=True)
    (folder / "deep" / "file.txt").write_text(text)
    return folder

def told(**facts):
    with open("told.jsonl", "a") as file:
        file.write(json.dumps({"step": current.step_name, "attempt": current.retry_count, **facts}) + "\\n")

class Stored(FlowSpec):
    lives = Parameter("lives", type=int, default=9)

    @step
    def start(self):
        self.first = store.put_dir(directory("first"), "model", number=1)
        self.second = store.put_dir(directory("second"), "model", number=2)
        self.next(self.work)

    @retry(times=1, minutes_between_retries=0)
    @step
    def work(self):
        found = store.get_latest("training", "restored", base="first")
        begun = found["metadata"]["number"] if found else 0
        told(begun=begun, text=(Path("restored") / "deep" / "file.txt").read_text() if found else None)
        for number in range(begun + 1, begun + 4):
            store.put_dir(directory(f"training {number}"), "training", number=number, base="first")
        store.put_dir(directory("other"), "training", number=99, base="second")
        had = len(store.stored("training"))
        store.prune("training", keep=3)
        told(pruned=had - len(store.stored("training")))
        if Path("dies").exists():
            raise RuntimeError("as planned")
        self.next(self.end)

    @step
    def end(self):
        for reference in (self.first, self.second, self.first):
            file = store.get_dir(reference, "copy") / "deep" / "file.txt"
            told(text=file.read_text(), link=file.is_symlink())
            file.write_text("overwritten")

if __name__ == "__main__":
    Stored()
"""


@pytest.fixture(scope="module")
def flow(tmp_path_factory):
    """Run the flow with these arguments, in a folder that all calls share; returns what its steps told and the exit code."""
    folder = tmp_path_factory.mktemp("store")
    (folder / "flow.py").write_text(textwrap.dedent(FLOW))
    env = os.environ | {"PYTHONPATH": str(ROOT), "METAFLOW_DATASTORE_SYSROOT_LOCAL": str(folder)}

    def run(*arguments, dies=False):
        (folder / "told.jsonl").write_text("")
        (folder / "dies").touch() if dies else (folder / "dies").unlink(missing_ok=True)
        command = [sys.executable, "flow.py", "--no-pylint", *arguments, "--run-id-file", "run_id"]
        done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=120)
        rows = [json.loads(line) for line in (folder / "told.jsonl").read_text().splitlines()]
        return rows, done.returncode, (folder / "run_id").read_text()

    return run


@pytest.fixture(scope="module")
def runs(flow):
    """A run whose work fails twice; a resumed run that fails too; one that resumes that one, and ends well; and a step run again."""
    made = {}
    made["died"], code, died = flow("run", dies=True)
    assert code == 1
    made["died again"], code, again = flow("resume", "--origin-run-id", died, dies=True)
    assert code == 1
    made["ended"], code, ended = flow("resume", "--origin-run-id", again)
    assert code == 0
    made["afresh"], code, _ = flow("resume", "work", "--origin-run-id", ended)
    assert code == 0
    return made


def begun(rows):
    return [row["begun"] for row in rows if "begun" in row]


def test_writing_into_a_copy_leaves_the_stored_directory_alone(runs):
    copies = [row for row in runs["ended"] if row["step"] == "end"]
    assert [row["text"] for row in copies] == ["first", "second", "first"]
    assert not any(row["link"] for row in copies)


def test_a_retry_goes_on_from_the_latest_directory_of_the_attempt_before(runs):
    assert begun(runs["died"]) == [0, 3]
    assert runs["died"][2]["text"] == "training 3"


def test_a_resumed_run_goes_on_from_the_latest_directory_of_the_run_that_it_resumes(runs):
    assert begun(runs["died again"]) == [6, 9]
    assert begun(runs["ended"]) == [12]


def test_what_began_at_another_base_is_not_gone_on_from(runs):
    assert 99 not in begun(runs["died"])


def test_a_step_that_had_succeeded_starts_afresh(runs):
    assert begun(runs["afresh"]) == [0]


def test_prune_keeps_the_newest_of_all_attempts(runs):
    assert [row["pruned"] for row in runs["died"] if "pruned" in row] == [1, 4]


def test_a_name_with_a_separator_is_refused(tmp_path):
    from a2d_core import store

    with pytest.raises(AssertionError, match="separate"):
        store.put_dir(tmp_path, "a.b")


def test_checkpoints_in_another_datastore_than_the_artifacts_are_refused():
    from a2d_core import store
    from a2d_core.config import UserError

    store.check_datastore("local")
    with pytest.raises(UserError, match="METAFLOW_DEFAULT_DATASTORE=s3"):
        store.check_datastore("s3")
