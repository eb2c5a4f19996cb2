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
        output = Path("output", current.run_id, str(current.retry_count))
        found = store.restore("training", output, base="first")
        begun = int(found.name.split("-")[1]) if found else 0
        there = sorted(path.name for path in output.glob("*"))
        told(begun=begun, there=there, text=(found / "deep" / "file.txt").read_text() if found else None)
        for step in range(begun + 1, begun + 4):
            score = {1: 5.0, 2: 2.0, 8: 2.0, 9: 3.0}.get(step)  # the best is 2, until there is 8, as good and newer
            store.put_dir(directory(f"training {step}"), "training", step=step, score=score, base="first")
        store.put_dir(directory("other"), "training", step=99, score=None, base="second")
        store.prune("training", keep=2)
        told(kept=[reference["metadata"]["step"] for reference in store.own("training")])
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


def test_prune_keeps_the_newest_of_all_attempts_and_the_best(runs):
    assert [row["kept"] for row in runs["died"] if "kept" in row] == [[99, 3, 2], [99, 6, 2]]


def test_the_best_is_there_again_beside_the_newest_in_each_run_that_goes_on(runs):
    there = {name: [row["there"] for row in runs[name] if "there" in row] for name in runs}
    assert there["died"] == [[], ["checkpoint-2", "checkpoint-3"]]
    assert there["died again"] == [["checkpoint-2", "checkpoint-6"], ["checkpoint-8", "checkpoint-9"]]
    assert there["ended"] == [["checkpoint-12", "checkpoint-8"]]
    assert there["afresh"] == [[]]


KILLED = """
import os, signal, sys
from a2d_core import store
with store.workroom("sft") as room:
    (room / "half").mkdir()
    print(room, flush=True)
    if sys.argv[1] == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    sys.stdin.read()
"""


def test_what_a_killed_step_left_is_deleted_by_the_next_and_what_another_works_in_is_not(tmp_path, monkeypatch):
    from a2d_core import store

    def start(what):
        env = os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
        process = subprocess.Popen([sys.executable, "-c", KILLED, what], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        return process, Path(process.stdout.readline().strip())

    (dead, left), (alive, room) = start("die"), start("wait")
    dead.wait()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (tmp_path / f"{store.ROOM}link").symlink_to(elsewhere)
    monkeypatch.setattr(store.tempfile, "tempdir", str(tmp_path))
    with store.workroom("new"):
        assert left.exists()  # it may be so new that it has no lock yet
    for path in (left, room, elsewhere):
        os.utime(path, (0, 0))
    with store.workroom("new") as mine:
        assert mine.exists() and room.exists() and elsewhere.exists() and not left.exists()
    assert not mine.exists()
    alive.communicate("")
    assert not room.exists()


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
