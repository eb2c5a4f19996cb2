"""What a stage looks at before it works: its output directory, the disk, and what it says of full memory."""

import json
import re
import struct
from pathlib import Path

import pytest

from a2d_core import checkpoints
from a2d_core.config import SampleConfig, TrainConfig, UserError
from a2d_core.launch import WorkerError
from a2d_core.stages import checks

MANY_PARAMETERS = 10**12


def test_an_output_directory_is_overwritten_only_where_a_stage_made_it(tmp_path):
    (tmp_path / "old" / "checkpoint-3").mkdir(parents=True)
    assert checks.output_directory(tmp_path / "old", overwrite=True) == tmp_path / "old"
    assert not list((tmp_path / "old").iterdir())


def test_parameters_are_counted_without_reading_them(tmp_path):
    header = json.dumps({"__metadata__": {}, "a": {"shape": [3, 4]}, "b": {"shape": []}}).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    assert checks.parameters(tmp_path) == 13
    assert checks.parameters(tmp_path / "nowhere") == 0


def test_too_little_disk_is_noticed_before_training(tmp_path):
    header = json.dumps({"a": {"shape": [MANY_PARAMETERS]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(UserError, match=r"too little disk at .* 1000000.0 million parameters need about \d+.\d GiB"):
        checks.room_for_checkpoints(TrainConfig(), tmp_path, tmp_path / "not" / "yet" / "there")


@pytest.mark.parametrize(
    "error",
    [WorkerError("rank 1 failed", rank=1, kind="OutOfMemoryError"), RuntimeError("CUDA error: out of memory")],
    ids=["rank", "here"],
)
def test_full_memory_names_the_fields_to_lower(error):
    with pytest.raises(checks.MemoryFullError) as caught, checks.memory_advice("sft", TrainConfig(batch_size=7, max_length=640)):
        raise error
    for field in ("sft.batch_size=7", "sft.gradient_accumulation_steps=1", "sft.max_length=640", "sft.gradient_checkpointing=true"):
        assert field in str(caught.value)
    with pytest.raises(RuntimeError, match="something else"), checks.memory_advice("sft", TrainConfig()):
        raise RuntimeError("something else")
    advice = re.escape("lower sample.batch_size=32 or sample.max_new_tokens")
    with pytest.raises(checks.MemoryFullError, match=advice), checks.memory_advice("sample", SampleConfig()):
        raise error


def test_a_directory_that_may_not_even_be_looked_at_is_told_plainly(monkeypatch):
    def refuse(path, **options):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "exists", refuse)
    with pytest.raises(UserError, match=r"cannot write to output directory '/locked/out' \(Permission denied\)"):
        checks.output_directory("/locked/out")


def test_a_sealed_directory_has_the_digest_of_its_files_until_one_changes(tmp_path):
    with checkpoints.whole(tmp_path / "model") as folder:
        for name in ("model.safetensors", "config.json", "notes.txt"):
            (folder / name).write_text(name)
    sealed = checkpoints.digest(tmp_path / "model", as_sealed=True)
    (tmp_path / "model" / "notes.txt").write_text("other notes, which are no part of the model")
    assert checkpoints.digest(tmp_path / "model") == sealed
    (tmp_path / "model" / "config.json").write_text("{}")
    assert checkpoints.digest(tmp_path / "model") != sealed == checkpoints.digest(tmp_path / "model", as_sealed=True)
