"""Training loses no step: killed anywhere, stopped, or out of disk, it goes on from the last whole checkpoint as if nothing had been.

The trainings run in forks of one process that has imported everything: `python tests/test_interruption.py FOLDER`.
"""

from __future__ import annotations

import errno
import gc
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from families import byte_model
from transformers import Trainer

from a2d_core import checkpoints, guard, launch, likelihood, trainer
from a2d_core.config import StoppedError, TrainConfig, UserError
from a2d_core.data import DiffusionCollator
from a2d_core.stages import checks, training

HERE = Path(__file__).resolve()
CONFIG = TrainConfig(
    max_length=16, max_steps=9, batch_size=3, gradient_accumulation_steps=2, views=2, learning_rate=1e-3, lr_scheduler="cosine",
    precision="float32", eval_every=4, save_every=2, log_every=3, keep_checkpoints=2,
)  # fmt: skip
"""Two epochs of five steps; checkpoints lie between the logs, and one comes right after an evaluation."""
KILLS = {
    "in step 1, before any checkpoint": (None, "micro-batch", 1),
    "in step 4, mid-accumulation": (2, "micro-batch", 7),
    "in step 7, in the second epoch": (6, "micro-batch", 14),
    "mid-evaluation": (2, "evaluation", 2),
    "mid-weights": (2, "weights", 2),
    "mid-optimizer": (2, "optimizer", 2),
    "between the weights and the optimizer": (4, "before the optimizer", 3),
    "between the random state and the trainer's": (4, "before the trainer's state", 3),
    "whole, but not renamed": (2, "before the new name", 2),
    "renamed, the old one not yet deleted": (6, "before the clean-up", 3),
}
"""Where SIGKILL comes -> the step of the checkpoint to go on from, the point, and the how-manieth time there."""


def rows(count: int = 30) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(5)
    return [{"input_ids": torch.randint(97, 122, (16,), generator=generator).tolist(), "row": 100 + i} for i in range(count)]


def train(folder: Path, config: TrainConfig = CONFIG, resume_from: str | None = None) -> dict[str, Any]:
    """Train a model with dropout, so that the state of the random numbers matters."""
    model = byte_model(attention_dropout=0.2)
    collate = DiffusionCollator(model.objective, model.eos_token_id)
    return trainer.fit(model, config, rows(), rows(8), collate, folder, stage="pretrain", resume_from=resume_from)


def go_on(folder: Path, config: TrainConfig = CONFIG) -> dict[str, Any]:
    """Train from the newest whole checkpoint, as the command line does; from the beginning where there is none."""
    has_any = checkpoints.newest(folder) is not None
    return train(folder, config, checks.newest_checkpoint(folder) if has_any else None)


def at(point: str, time: int, act: Callable[[], None]) -> None:
    """Make this process act when it is at a point for the n-th time."""
    left = [time]

    def due() -> bool:
        left[0] -= 1
        return left[0] == 0

    def around(owner: Any, name: str, *, before: bool) -> None:
        original = getattr(owner, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if before and due():
                act()
            result = original(*args, **kwargs)
            if not before and due():
                act()
            return result

        setattr(owner, name, wrapped)

    def half(owner: Any, name: str, file: str) -> None:
        original = getattr(owner, name)

        def wrapped(value: Any, path: Any, *args: Any, **kwargs: Any) -> Any:
            result = original(value, path, *args, **kwargs)
            if str(path).endswith(file) and due():
                os.truncate(path, Path(path).stat().st_size // 2)
                act()
            return result

        setattr(owner, name, wrapped)

    if point == "micro-batch":
        around(trainer.DiffusionTrainer, "training_step", before=False)
    elif point == "evaluation":
        around(likelihood, "nelbo", before=False)
    elif point == "weights":
        half(sys.modules["transformers.modeling_utils"], "safe_save_file", "model.safetensors")
    elif point == "optimizer":
        half(torch, "save", "optimizer.pt")
    elif point == "before the optimizer":
        around(Trainer, "_save_optimizer_and_scheduler", before=True)
    elif point == "before the trainer's state":
        around(Trainer, "_save_rng_state", before=False)
    elif point == "before the new name":
        around(checkpoints, "_move", before=True)
    else:
        around(checkpoints, "prune", before=True)


def in_fork(work: Callable[[], Any]) -> int:
    """Run in a fork, and return how it ended: 0, 1 for an exception, or minus the signal."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except StoppedError as error:
            print(error, flush=True)
            os._exit(143)
        except UserError as error:
            print(error, flush=True)
            os._exit(2)
        except BaseException:
            sys.excepthook(*sys.exc_info())
            sys.stderr.flush()
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def tell() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def let_no_file_grow(folder: Path, file: str) -> None:
    """Let no file of this process grow to the size that this file of a checkpoint has."""
    limit = (folder / "straight" / "checkpoint-8" / file).stat().st_size - 1000
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


def scenarios(folder: Path) -> None:
    """The straight training, and each interrupted one with what goes on from it."""
    torch.set_num_threads(1)
    gc.freeze()  # each training collects garbage, and would look at all that was imported
    os.fsync = lambda handle: None  # a process that is killed loses nothing that the kernel has
    assert in_fork(lambda: train(folder / "straight")) == 0

    def interrupted(name: str, point: str, time: int, act: Callable[[], None], code: int) -> None:
        def work() -> None:
            at(point, time, act)
            train(folder / name)

        assert in_fork(work) == code, name
        found = checkpoints.newest(folder / name)
        (folder / f"{name}.txt").write_text(found.name if found else "none")
        assert in_fork(lambda: go_on(folder / name)) == 0, name

    for name, (_, point, time) in KILLS.items():
        interrupted(name, point, time, kill, -signal.SIGKILL)
    interrupted("told mid-accumulation", "micro-batch", 9, tell, 143)
    interrupted("told mid-evaluation", "evaluation", 2, tell, 143)
    interrupted("told while saving", "before the trainer's state", 2, tell, 143)
    interrupted("full model.safetensors", "micro-batch", 6, lambda: let_no_file_grow(folder, "model.safetensors"), 2)
    interrupted("full optimizer.pt", "micro-batch", 6, lambda: let_no_file_grow(folder, "optimizer.pt"), 2)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("interruption")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE.parents[1]), str(HERE.parent)])}
    ran = subprocess.run([sys.executable, str(HERE), str(folder)], env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-4000:]
    (folder / "output.txt").write_text(ran.stdout)
    yield folder
    shutil.rmtree(folder)


def logged(folder: Path) -> list[dict[str, Any]]:
    """Every logged number that is no measurement of time or memory, to the bit."""
    measured = ("runtime", "per_second", "memory_mb", "seconds_left")
    history = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{name: value for name, value in row.items() if not name.endswith(measured) and name != "max_steps"} for row in history]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(folder / "checkpoint-final" / "model.safetensors")


def assert_equal_to_the_bit(one: Path, other: Path) -> None:
    assert logged(one) == logged(other)
    a, b = weights(one), weights(other)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("name", KILLS)
def test_killed_anywhere_and_resumed_it_equals_a_straight_training_to_the_bit(name: str, done: Path) -> None:
    step = KILLS[name][0]
    assert (done / f"{name}.txt").read_text() == (f"checkpoint-{step}" if step else "none")
    assert_equal_to_the_bit(done / name, done / "straight")
    assert [row["step"] for row in logged(done / "straight") if "loss" in row] == [3, 6, 9]
    assert not (done / name / checkpoints.PARTIAL).exists()
    assert sorted(path.name for path in (done / name).glob("checkpoint-*")) == ["checkpoint-8", "checkpoint-9", "checkpoint-final"]


@pytest.mark.parametrize(("name", "step"), [("told mid-accumulation", 5), ("told mid-evaluation", 4), ("told while saving", 4)])
def test_sigterm_saves_at_the_end_of_the_step_and_nothing_is_lost(name: str, step: int, done: Path) -> None:
    assert (done / f"{name}.txt").read_text() == f"checkpoint-{step}"
    assert_equal_to_the_bit(done / name, done / "straight")
    assert f"stopped by SIGTERM at step {step} of 9, with nothing lost: the last good checkpoint is" in (done / "output.txt").read_text()


# --- several processes ---


def told_in_a_worker(folder: str, caller: int) -> None:
    """What each worker does: train until rank 1 has SIGTERM sent to the process that started them all."""
    if torch.distributed.get_rank() == 1:
        at("micro-batch", 5, lambda: os.kill(caller, signal.SIGTERM))
    two_processes(folder)


def two_processes(folder: str, resume: bool = False) -> None:
    config = replace(CONFIG, batch_size=1, save_every=50)
    go_on(Path(folder), config) if resume else train(Path(folder), config)


def resumed_and_straight(folder: str) -> None:
    two_processes(folder, resume=True)
    two_processes(folder + "-straight")


def test_two_processes_stop_at_the_same_step_and_go_on_to_the_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(HERE.parent))
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    out = tmp_path / "two"
    with pytest.raises(StoppedError, match=r"stopped by SIGTERM at step \d+ of 9, with nothing lost"):
        launch.run("test_interruption:told_in_a_worker", {"folder": str(out), "caller": os.getpid()}, processes=2)
    (stopped,) = checkpoints.steps(out)
    assert 3 <= stopped < 9
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= {path.name for path in (out / f"checkpoint-{stopped}").iterdir()}
    launch.run("test_interruption:resumed_and_straight", {"folder": str(out)}, processes=2)
    assert_equal_to_the_bit(out, tmp_path / "two-straight")


# --- damage ---


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    train(folder, replace(CONFIG, max_steps=4))
    return folder


@pytest.fixture
def copy(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "out"))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "cut": (lambda folder: os.truncate(folder / "optimizer.pt", 1000), r"optimizer.pt has 1,000 bytes instead of [\d,]+"),
    "missing": (lambda folder: (folder / "rng_state.pth").unlink(), "rng_state.pth is missing"),
    "one bit": (lambda folder: flip(folder / "model.safetensors"), "model.safetensors is not what was written"),
    "no manifest": (lambda folder: (folder / "manifest.json").unlink(), "it has no manifest.json"),
    "half a manifest": (lambda folder: os.truncate(folder / "manifest.json", 99), "manifest.json is damaged"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_and_the_one_before_is_used(kind: str, copy: Path, capsys: pytest.CaptureFixture) -> None:
    harm, what = DAMAGES[kind]
    assert checks.newest_checkpoint(copy) == str(copy / "checkpoint-4")
    harm(copy / "checkpoint-4")
    assert checks.newest_checkpoint(copy) == str(copy / "checkpoint-2")
    assert f"'{copy}/checkpoint-4' is damaged and passed over" in capsys.readouterr().out
    with pytest.raises(UserError, match=rf"checkpoint '.*/checkpoint-4' is damaged: {what}.*; the last good checkpoint is '.*/checkpoint-"):
        training.run("sft", CONFIG, copy, copy, seed=0, processes=1, resume_from=str(copy / "checkpoint-4"))


def test_an_output_without_a_whole_checkpoint_is_refused(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-3").mkdir()
    with pytest.raises(UserError, match="holds no checkpoint to resume from: start without --resume"):
        checks.newest_checkpoint(tmp_path)
    with pytest.raises(UserError, match=r"there is no checkpoint '.*checkpoint-7' to resume from"):
        checkpoints.check(tmp_path / "checkpoint-7")


def test_a_training_that_is_begun_again_overwrites_what_it_had_passed_over(copy: Path) -> None:
    flip(copy / "checkpoint-4" / "optimizer.pt")
    go_on(copy, replace(CONFIG, max_steps=4))
    assert checkpoints.damage(copy / "checkpoint-4") is None


# --- a full disk ---


@pytest.mark.parametrize(
    "file", ["model.safetensors", "optimizer.pt", "rng_state.pth", "trainer_state.json", "manifest.json", "tokenizer.json"]
)
def test_a_full_disk_stops_the_training_and_leaves_the_checkpoint_before(
    file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full from a file of the second checkpoint on."""
    original = checkpoints._sync

    def full(path: Path) -> None:
        if path.name == file and "checkpoint-4" in str(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        original(path)

    monkeypatch.setattr(checkpoints, "_sync", full)
    with pytest.raises(UserError, match=r"cannot write '.*/checkpoint-4' \(No space left on device\): [\d,.]+ MiB are free at") as caught:
        train(tmp_path)
    assert "a checkpoint takes 0." in str(caught.value) and f"the last good checkpoint is '{tmp_path}/checkpoint-2'" in str(caught.value)
    assert checkpoints.damage(tmp_path / "checkpoint-2") is None
    assert not (tmp_path / "partial").exists() and not (tmp_path / "checkpoint-4").exists()
    assert "No space left" not in (tmp_path / "metrics.jsonl").read_text()


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.pt"])
def test_a_writer_of_a_library_that_fails_is_told_the_same_way_and_the_training_can_go_on(file: str, done: Path) -> None:
    """The kernel lets no file grow beyond a limit: a limit below the size of the weights, or of the optimizer's moments."""
    assert (done / f"full {file}.txt").read_text() == "checkpoint-2"
    assert_equal_to_the_bit(done / f"full {file}", done / "straight")
    message = next(line for line in (done / "output.txt").read_text().splitlines() if f"full {file}/checkpoint-4'" in line)
    assert "are free at" in message and f"the last good checkpoint is '{done}/full {file}/checkpoint-2'" in message


def test_every_librarys_word_for_a_full_disk_is_understood_and_other_errors_pass(tmp_path: Path) -> None:
    """The first is what the tokenizers' library raises, the second like what torch.distributed.checkpoint does."""
    target = tmp_path / "checkpoint-1"
    for error in (Exception("No space left on device (os error 28)"), SystemError("rank 0:\nOSError: [Errno 28] No space left on device")):
        with pytest.raises(UserError, match=r"cannot write '.*/checkpoint-1' \(.*No space left on device"), checkpoints.told(target):
            raise error
    with pytest.raises(RuntimeError, match="Connection closed by peer"), checkpoints.whole(target):
        raise RuntimeError("Connection closed by peer")
    assert not list(tmp_path.iterdir())


def test_a_log_that_cannot_be_written_stops_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Path.open

    def full(path: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if path.name == "metrics.jsonl" and mode == "a" and (tmp_path / "checkpoint-4").exists():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(path, mode, *args, **kwargs)

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(
        UserError, match=r"cannot write '.*/metrics.jsonl' \(No space left on device\).*last good checkpoint is '.*checkpoint-4'"
    ):
        train(tmp_path)


# --- divergence ---


def spoiled(monkeypatch: pytest.MonkeyPatch, time: int, factor: float) -> None:
    """Multiply the loss of the n-th micro-batch by a factor."""
    original, count = trainer.DiffusionTrainer.compute_loss, [0]

    def compute_loss(self: Any, *args: Any, **kwargs: Any) -> Any:
        count[0] += 1
        return original(self, *args, **kwargs) * (factor if count[0] == time else 1)

    monkeypatch.setattr(trainer.DiffusionTrainer, "compute_loss", compute_loss)


@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_stops_at_its_step_and_names_its_rows(
    factor: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoiled(monkeypatch, 9, factor)
    seen: list[list[int]] = []
    original = guard.Guard.add_loss
    monkeypatch.setattr(
        guard.Guard, "add_loss", lambda self, step, loss, rows: (seen.append(rows.tolist()), original(self, step, loss, rows))
    )
    with pytest.raises(UserError, match=rf"the loss became {factor} at step 5: lower learning_rate=0.001") as caught:
        train(tmp_path)
    assert f"computed from rows {str(seen[8])[1:-1]} of" in str(caught.value) and len(seen) == 10
    assert f"the last good checkpoint is '{tmp_path}/checkpoint-4'" in str(caught.value)
    assert [path.name for path in checkpoints.steps(tmp_path).values()] == ["checkpoint-4", "checkpoint-2"]


def test_an_exploding_gradient_stops_the_training_unless_it_is_let_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(CONFIG, max_steps=14, log_every=1, eval_every=50)
    spoiled(monkeypatch, 25, 1e5)
    with pytest.raises(
        UserError, match=r"the gradient's norm exploded to .*, above .* \(explode_factor=1000\) at step 13: lower learning"
    ) as caught:
        train(tmp_path / "a", config)
    assert "checkpoint-12'" in str(caught.value)
    spoiled(monkeypatch, 25, 1e5)
    assert train(tmp_path / "b", replace(config, explode_factor=0))["steps"] == 14


def test_on_a_gpu_losses_are_read_where_a_step_is_logged_or_saved(tmp_path: Path) -> None:
    """What was bad steps ago is found then, and named with its own step and rows."""
    watch = guard.Guard(CONFIG, tmp_path)
    for step in range(1, 6):
        watch.add_loss(step, torch.tensor(float("inf") if step == 2 else 1.0), torch.tensor([10 * step, 10 * step + 1]))
        watch.add_norm(step, torch.tensor(float("nan") if step >= 2 else 1.0))
    with pytest.raises(UserError, match=r"the loss became inf at step 2: .* computed from rows 20, 21 of"):
        watch.check(trainer.TrainerState())


def test_a_lower_learning_rate_holds_for_what_is_resumed(tmp_path: Path) -> None:
    config = replace(CONFIG, max_steps=4, lr_scheduler="constant", log_every=1)
    train(tmp_path, config)
    train(tmp_path, replace(config, learning_rate=2e-4), str(tmp_path / "checkpoint-2"))
    rates = {row["step"]: row["learning_rate"] for row in logged(tmp_path) if "learning_rate" in row}
    assert rates == {1: 1e-3, 2: 1e-3, 3: 2e-4, 4: 2e-4}


if __name__ == "__main__":
    scenarios(Path(sys.argv[1]))
