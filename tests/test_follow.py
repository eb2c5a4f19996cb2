"""Following a training from outside: every row and checkpoint arrives once, and no trouble of the follower's stops the training."""

import json
import shutil
import time

import pytest

from a2d_core import checkpoints
from a2d_core.config import StoppedError
from a2d_core.follow import Follower


class Log:
    """Takes rows, unless it is down."""

    def __init__(self):
        self.waiting, self.sent, self.is_down = [], [], False

    def add(self, rows):
        self.waiting += rows

    def send(self):
        if self.is_down:
            raise ConnectionError("nobody is there")
        self.sent += self.waiting
        count = len(self.waiting)
        self.waiting = []
        return count


@pytest.fixture
def log():
    return Log()


@pytest.fixture
def output(tmp_path):
    (tmp_path / "output").mkdir()
    return tmp_path / "output"


def follow(output, log, **options):
    return Follower(output, log=log, interval=0.01, **options)


def write(output, *rows, end="\n"):
    with (output / "metrics.jsonl").open("a") as file:
        file.write("\n".join(json.dumps(row) for row in rows) + end)


def checkpoint(output, step):
    with checkpoints.whole(output / f"checkpoint-{step}") as folder:
        (folder / "weights").write_text(str(step))


def until(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.005)


def test_rows_arrive_while_the_training_runs_and_each_once(output, log):
    shown = []
    with follow(output, log, on_rows=lambda rows: shown.append(len(rows))):
        write(output, {"step": 1, "loss": 2.0})
        until(lambda: len(log.sent) == 1 and shown)
        write(output, {"step": 2, "loss": 1.0}, {"step": 3, "loss": 0.5})
    assert [row["step"] for row in log.sent] == [1, 2, 3]
    assert shown[0] == 1
    assert shown[-1] == 3


def test_a_half_written_row_waits_for_its_end(output, log):
    with follow(output, log):
        write(output, {"step": 1, "loss": 2.0}, {"step": 2}, end="")
        until(lambda: len(log.sent) == 1)
        write(output)
    assert [row["step"] for row in log.sent] == [1, 2]


def test_a_file_that_is_begun_anew_is_read_anew(output, log):
    write(output, {"step": 1, "loss": 2.0}, {"step": 2, "loss": 9.0})
    with follow(output, log) as follower:
        until(lambda: len(log.sent) == 2)
        (output / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 2.0}) + "\n")
        write(output, *({"step": step, "loss": 1.0} for step in (2, 3, 4)))
    assert [row["step"] for row in follower.rows] == [1, 2, 3, 4]


def test_complete_checkpoints_are_handed_over_and_outlive_the_trainers_own_clean_up(output, log):
    kept = {}

    def keep(step, folder):
        shutil.rmtree(output / f"checkpoint-{step}")
        kept[step] = (folder / "weights").read_text()

    with follow(output, log, on_checkpoint=keep):
        (output / "checkpoint-5").mkdir()
        (output / "checkpoint-5" / "weights").write_text("half writ")
        (output / "checkpoint-final").mkdir()
        checkpoint(output, 10)
        until(lambda: 10 in kept)
        checkpoint(output, 20)
    assert kept == {10: "10", 20: "20"}
    assert not list(output.parent.glob("keep-*"))


def test_a_checkpoint_that_is_deleted_while_it_is_copied_is_not_handed_over(output, log, monkeypatch):
    kept = []
    copytree = shutil.copytree

    def late(source, target, **options):
        (source / "weights").unlink()  # the trainer's clean-up is at it
        return copytree(source, target, **options)

    with monkeypatch.context() as patch, follow(output, log, on_checkpoint=lambda step, _: kept.append(step)):
        patch.setattr(shutil, "copytree", late)
        checkpoint(output, 10)
        until(lambda: not (output / "checkpoint-10" / "weights").exists())
        patch.undo()
        checkpoint(output, 20)
    assert kept == [20]


def test_the_best_checkpoint_is_handed_over_though_a_newer_one_has_come_and_none_that_was_there_before(output, log):
    kept = []

    def slow(step, _):
        kept.append(step)
        if step == 5:  # meanwhile two more are made, and the trainer deletes neither
            write(output, {"step": 6, "eval_nelbo": 1.0})
            checkpoint(output, 6)
            write(output, {"step": 7, "eval_nelbo": 2.0})
            checkpoint(output, 7)

    checkpoint(output, 4)
    write(output, {"step": 4, "eval_nelbo": 3.0})
    with follow(output, log, on_checkpoint=slow):
        write(output, {"step": 5, "eval_nelbo": 4.0})
        checkpoint(output, 5)
        until(lambda: 7 in kept)
    assert kept == [5, 6, 7]


def test_the_checkpoint_of_a_training_that_was_stopped_is_handed_over(output, log):
    kept = []

    def train():
        with follow(output, log, on_checkpoint=lambda step, _: kept.append(step)):
            checkpoint(output, 3)
            raise StoppedError("stopped by SIGTERM at step 3")

    with pytest.raises(StoppedError):
        train()
    assert kept == [3]


def test_an_error_of_a_callback_surfaces_at_the_end_and_stops_nothing_else(output, log, capsys):
    kept = []

    def show(rows):
        raise ValueError("no card")

    def train():
        with follow(output, log, on_rows=show, on_checkpoint=lambda step, _: kept.append(step)):
            write(output, {"step": 1, "loss": 2.0})
            until(lambda: "no card" in capsys.readouterr().err)
            write(output, {"step": 2, "loss": 1.0})
            checkpoint(output, 2)

    with pytest.raises(ValueError, match="no card"):
        train()
    assert len(log.sent) == 2
    assert kept == [2]


def test_an_error_of_the_training_is_the_one_that_is_raised(output, log):
    def show(rows):
        raise ValueError("no card")

    def train():
        with follow(output, log, on_rows=show):
            write(output, {"step": 1, "loss": 2.0})
            raise RuntimeError("diverged")

    with pytest.raises(RuntimeError, match="diverged"):
        train()
    assert len(log.sent) == 1


def test_rows_wait_while_the_log_is_down(output, log, capsys):
    log.is_down = True
    with follow(output, log):
        write(output, {"step": 1, "loss": 2.0})
        until(lambda: "does not take metrics" in capsys.readouterr().err)
        write(output, {"step": 2, "loss": 1.0})
        log.is_down = False
    assert [row["step"] for row in log.sent] == [1, 2]


def test_a_log_that_stays_down_has_refused_and_the_training_is_done(output, log):
    log.is_down = True
    with follow(output, log, patience=0.05) as follower:
        write(output, {"step": 1, "loss": 2.0})
    assert "nobody is there" in str(follower.refused)
    assert follower.rows == [{"step": 1, "loss": 2.0}]
