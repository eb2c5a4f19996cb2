"""Every preset, run on tiny stand-ins for its model and its data: what needs the Hub, a GPU or a cluster, offline on one CPU."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import re
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import families
import pytest

from a2d_core import __main__ as cli
from a2d_core import embedded, models, presets, tracking
from a2d_core.config import OBJECTIVES, Recipe
from a2d_core.settings import to_dict
from a2d_core.stages import convert, evaluate, preflight, pretrain, register, sample, sft

ROOT = Path(__file__).resolve().parents[1]
SMALL = {"max_steps": 2, "batch_size": 2, "max_eval_rows": 4, "log_every": 1, "precision": "float32", "num_workers": 1}
HERE = {"gpu": 0, "processes": 1, "nodes": 1, "strategy": "ddp", "retries": 0}
CHANGED = {
    "convert": {"model"},
    "pretrain": {*SMALL, "gradient_accumulation_steps", "dataset", "shuffle_buffer"},
    "sft": {*SMALL, "gradient_accumulation_steps", "dataset"},
    "sample": {"max_new_tokens"},
    "evaluate": {"limit", "text_dataset", "text_rows", "nelbo_samples", "datasets"},
    "compute": {"platform", "convert", "train", "generate"},
}
"""All that a stand-in may have otherwise than its preset."""
IN_THE_FLOW = {"qwen3-0.6b-openwebtext": ("bd3lm",)}
"""What every run of the tests takes through the flow; the others are marked long."""
IN_PROCESS = {
    "default": ("bd3lm",),
    "tiny": ("mdlm",),
    "qwen3-0.6b": ("bd3lm",),
    "qwen3-0.6b-shakespeare": OBJECTIVES,
    "qwen3-0.6b-alpaca": OBJECTIVES,
    "qwen3-0.6b-openwebtext": ("mdlm",),
    "published-sft": ("bd3lm",),
    "qwen2.5-coder-0.5b": ("mdlm",),
}
"""What every run of the tests takes through the stages in one process; `smoke` is run by test_flow.py."""


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        if path.suffix == ".csv":
            table = csv.DictWriter(file, list(rows[0]))
            table.writeheader()
            table.writerows(rows)
        else:
            file.writelines(json.dumps(row) + "\n" for row in rows)


@pytest.fixture(scope="session")
def stand_ins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model of each family, and a few rows of each data set in its own schema, under its own name."""
    folder = tmp_path_factory.mktemp("stand-ins")
    tokenizer = embedded.build_tokenizer()
    for name in ("Qwen3-0.6B", "Qwen2.5-Coder-0.5B-Instruct"):
        network = families.network(
            name[:5].lower(), vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
            max_position_embeddings=4096, num_hidden_layers=1,
        )  # fmt: skip
        network.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    text = "\n".join(embedded.corpus_split()[1])
    pages = [text[1000 * i : 1000 * (i + 1)] for i in range(80)]
    for split, rows in (("train", pages[:20]), ("test", pages[20:24])):
        write(folder / "tiny-shakespeare" / f"{split}.csv", [{"Text": page} for page in rows])
    write(folder / "openwebtext" / "train.jsonl", [{"text": page} for page in pages])
    asked = [{"instruction": f"Count to {i}.", "input": "in words" * (i % 2), "output": "one, " * i, "text": "..."} for i in range(1, 21)]
    write(folder / "alpaca" / "train.jsonl", asked)
    talks = [
        [*({"role": role, "content": f"{role} {i}"} for role in ("user", "assistant")), {"role": "user", "content": "again"},
         {"role": "assistant", "content": f"{i} " * (3 + 40 * i)}]
        for i in range(20)
    ]  # fmt: skip
    write(folder / "tulu-3-sft-mixture" / "train.jsonl", [{"id": str(i), "messages": talk, "source": "x"} for i, talk in enumerate(talks)])
    write(folder / "smoltalk" / "all" / "train.jsonl", [{"messages": talk, "source": "x"} for talk in talks])
    write(folder / "smoltalk" / "all" / "test.jsonl", [{"messages": talk, "source": "x"} for talk in talks[:4]])
    for stage in ("opc-sft-stage1", "opc-sft-stage2"):
        code = [{"instruction": f"print {i}", "output": f"```{'c' if i % 2 else 'python'}\nprint({i})"} for i in range(20)]
        write(folder / stage / "train.jsonl", code)
    sums = [{"question": f"What is {i} and 2?", "answer": f"{i}+2={i + 2}\n#### {i + 2}"} for i in range(4)]
    for split in ("train", "test"):
        write(folder / "gsm8k" / "main" / f"{split}.jsonl", sums)
    return folder


def local(spec: str, folder: Path) -> str:
    """A preset's data with those of `folder` for the Hub's, of the same names; what stands in brackets stays, with smaller numbers."""
    spec = re.sub(r"[\w.-]+/([\w.-]+)", rf"{folder}/\1", spec)
    return re.sub(r"(train|test):\d+", lambda found: {"train": "train:60", "test": "test:10"}[found[1]], spec)


def stand_in(name: str, stand_ins: Path, folder: Path) -> Path:
    """A preset file on top of a preset: nothing but its model, its data, its sizes and its machine is another."""
    recipe = presets.resolve(presets.read(name), "bd3lm")
    is_embedded = recipe.convert.model.startswith("embedded")
    values: dict[str, Any] = {
        "base": name,
        "convert": {"model": "embedded:smoke" if is_embedded else str(stand_ins / Path(recipe.convert.model).name)},
        "sample": {"max_new_tokens": min(64, recipe.sample.max_new_tokens)},
        "evaluate": {"limit": 2, "text_dataset": local(str(recipe.evaluate.text_dataset), stand_ins), "text_rows": 4, "nelbo_samples": 2},
        "compute": {"platform": "local", **dict.fromkeys(("convert", "train", "generate"), HERE)},
    }
    for stage in ("pretrain", "sft"):
        config = getattr(recipe, stage)
        micro_batches = min(2, config.gradient_accumulation_steps)
        values[stage] = SMALL | {"dataset": local(config.dataset, stand_ins), "gradient_accumulation_steps": micro_batches}
    values["pretrain"]["shuffle_buffer"] = 8
    if "gsm8k" in recipe.evaluate.tasks:
        values["evaluate"]["datasets"] = {"gsm8k": str(stand_ins / "gsm8k")}
    path = folder / f"{name}.json"
    path.write_text(json.dumps(values))
    return path


def resolved(name: str, objective: str, stand_ins: Path, folder: Path) -> Recipe:
    return presets.resolve(presets.read(str(stand_in(name, stand_ins, folder))), objective)


# --- values -----------------------------------------------------------------------------------------

TRAINER = {"learning_rate": 1e-4, "lr_scheduler": "cosine", "warmup_ratio": 0.1, "schedule": "linear", "t_min": 1e-3, "t_max": 1.0}
ORIGINS = TRAINER | {"t_draws": "per_sequence", "predict_mask_token": True, "precision": "bfloat16", "batch_size": 16, "save_every": 0.1}
ORIGINS_SFT = ORIGINS | {"supervise": "last", "too_long": "truncate", "group_by_length": True}
PUBLISHED = ORIGINS_SFT | {"epochs": 10}
EXACT: dict[str, tuple[str, int, dict[str, Any], dict[str, int]]] = {
    "qwen3-0.6b-shakespeare": (
        "pretrain",
        16,
        ORIGINS | {"epochs": 20, "insert_eos": False, "text_field": "Text"},
        {"mdlm": 128, "bd3lm": 128},
    ),
    "qwen3-0.6b-alpaca": ("sft", 128, ORIGINS_SFT | {"epochs": 20}, {"mdlm": 512, "bd3lm": 512}),
    "qwen3-0.6b-openwebtext": (
        "pretrain",
        128,
        ORIGINS | {"max_steps": 100_000, "streaming": True, "insert_eos": True, "save_every": 0.05},
        {"mdlm": 512, "bd3lm": 512},
    ),
    "published-sft": ("sft", 2048, PUBLISHED, {"mdlm": 1024, "bd3lm": 512}),
    "qwen2.5-coder-0.5b": ("sft", 2048, PUBLISHED, {"mdlm": 1024, "bd3lm": 512}),
}
"""Preset -> its only training stage, rows of an optimizer step, fields, and length of a row, of the origin's scripts and commands."""


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("name", EXACT)
def test_the_origins_recipes_have_the_origins_values(name: str, objective: str) -> None:
    stage, rows, fields, length = EXACT[name]
    recipe = presets.resolve(presets.read(name), objective)
    config, train = getattr(recipe, stage), recipe.compute.train
    assert [s for s in ("pretrain", "sft") if getattr(recipe, s).enabled] == [stage]
    assert {field: getattr(config, field) for field in fields} == fields
    assert config.max_length == length[objective] and recipe.convert.block_size == 32
    assert config.batch_size * config.gradient_accumulation_steps * train.processes * getattr(train, "nodes", 1) == rows
    assert (train.processes, train.strategy) == ((1, "ddp") if name == "qwen3-0.6b-shakespeare" else (8, "zero2"))


@pytest.mark.parametrize("name", ["qwen3-0.6b-8gpu", "qwen3-0.6b-batch"])
def test_a_cluster_trains_as_one_gpu_does(name: str) -> None:
    ours, theirs = (to_dict(presets.resolve(presets.read(preset), "bd3lm")) for preset in (name, "qwen3-0.6b"))
    theirs["sft"]["gradient_accumulation_steps"] = 1
    assert {part for part in theirs if ours[part] != theirs[part]} == {"name", "compute"}


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("name", presets.names())
def test_a_stand_in_is_its_preset_but_for_model_data_sizes_and_machine(name: str, objective: str, stand_ins: Path, tmp_path: Path) -> None:
    ours, theirs = to_dict(resolved(name, objective, stand_ins, tmp_path)), to_dict(presets.resolve(presets.read(name), objective))
    for part, values in theirs.items():
        if isinstance(values, dict):
            assert {key for key in values if values[key] != ours[part][key]} <= CHANGED.get(part, set())
        else:
            assert values == ours[part]


# --- runs -------------------------------------------------------------------------------------------


def run_stages(recipe: Recipe, folder: Path) -> dict[str, Any]:
    """What the flow does with a recipe, in this process; the numbers of the stages, and the directory of the last model."""
    uri = f"sqlite:///{folder.parent}/mlflow.db"
    tracking.check_server(uri)
    preflight.inputs(recipe)
    model = untrained = folder / "converted"
    numbers = {"convert": convert.run(recipe.convert, recipe.objective, model, seed=recipe.seed)}
    preflight.checkpoint(recipe, model)
    for name, stage in (("pretrain", pretrain), ("sft", sft)):
        if getattr(recipe, name).enabled:
            numbers[name] = stage.run(getattr(recipe, name), model, folder / name, seed=recipe.seed)
            model = folder / name / "checkpoint-final"
    samples = sample.run(recipe.sample, model, folder / "samples", seed=recipe.seed)["samples"]
    results = evaluate.run(recipe.evaluate, recipe.sample, model, folder / "scores", seed=recipe.seed, baseline_dir=untrained)
    parent = tracking.start_parent(recipe, name="test")
    with tracking.stage_run(parent, "register"):
        made = register.run(model, recipe, tags=register.judge(recipe, results), results=results, samples=samples, facts=numbers)
    return {"numbers": numbers, "model": model, "samples": samples, "results": results, "registered": made}


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the runs of this module share an MLflow."""
    return tmp_path_factory.mktemp("runs")


@pytest.mark.parametrize(
    ("name", "objective"),
    [(name, objective) for name, objectives in IN_PROCESS.items() for objective in objectives],
)
def test_a_preset_runs_from_convert_to_register(name: str, objective: str, stand_ins: Path, room: Path) -> None:
    folder = room / f"{name}-{objective}"
    folder.mkdir()
    recipe = resolved(name, objective, stand_ins, folder)
    done = run_stages(recipe, folder)
    trained = [stage for stage in ("pretrain", "sft") if getattr(recipe, stage).enabled]
    chain = models.load(done["model"]).spec.chain
    assert [link["stage"] for link in chain] == ["convert", *trained]
    for stage in trained:
        numbers = done["numbers"][stage]
        assert numbers["steps"] == 2 and math.isfinite(numbers["eval_nelbo"])
        assert ("train_rows" not in numbers) == getattr(recipe, stage).streaming  # a stream has no end
    if EXACT.get(name, "")[2:3] == (PUBLISHED,):  # all of it but 1 of tulu's 20, and of the 10 in Python of each of OpenCoder's
        assert done["numbers"]["sft"]["train_rows"] == 19 + 20 + 9 + 9 and done["numbers"]["sft"]["dropped"] == {}
    assert len(done["samples"]) == len(recipe.sample.prompts)
    assert {row["task"] for row in done["results"]["tasks"]} >= set(recipe.evaluate.tasks)
    assert math.isfinite(done["results"]["text"]["nelbo"])
    assert done["registered"]["name"] == f"a2d-{name}-{objective}"


@pytest.mark.parametrize(
    ("name", "objective"),
    [
        pytest.param(name, objective, marks=() if objective in IN_THE_FLOW.get(name, ()) else pytest.mark.long)
        for name in presets.names()
        for objective in OBJECTIVES
    ],
)
def test_a_preset_runs_through_the_flow(name: str, objective: str, stand_ins: Path, tmp_path: Path) -> None:
    file = stand_in(name, stand_ins, tmp_path)
    recipe = presets.resolve(presets.read(str(file)), objective)
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("METAFLOW_", "MLFLOW_"))}
    environment |= {"USER": "root", "METAFLOW_DATASTORE_SYSROOT_LOCAL": str(tmp_path), "TMPDIR": str(tmp_path)}
    flow = [sys.executable, str(ROOT / "flows" / "a2d_flow.py"), "--config-value", "preset", str(file), "run", "--objective", objective]
    done = subprocess.run(flow, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    for stage in ("pretrain", "sft"):
        assert (f"{stage} is switched off" in done.stdout) == (not getattr(recipe, stage).enabled)
    with sqlite3.connect(f"file:{tmp_path}/mlflow.db?mode=ro", uri=True) as database:
        assert database.execute("select name, version from model_versions").fetchall() == [(f"a2d-{name}-{objective}", 1)]


# --- a user's own -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stage", "data", "raw"),
    [("sft", "chats.jsonl", []), ("pretrain", "text.txt", ["--raw"])],
)
def test_three_commands_lead_from_a_checkpoint_and_a_file_to_a_chat(
    stage: str,
    data: str,
    raw: list[str],
    stand_ins: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    write(Path("chats.jsonl"), [{"messages": row["messages"]} for row in embedded.instructions("train", 40)])
    Path("text.txt").write_text("\n".join(embedded.corpus_split()[1])[:20_000])
    monkeypatch.setattr(sys, "stdin", io.StringIO("Reverse: garden\n"))
    for command in (
        ["convert", "--model", str(stand_ins / "Qwen3-0.6B"), "--output-dir", "converted"],
        [stage, "--model", "converted", "--dataset", data, "--output-dir", "trained"],
        ["chat", "--model", "trained/checkpoint-final", *raw],
    ):
        assert cli.main(command) == 0, capsys.readouterr().err
    assert capsys.readouterr().out.splitlines()[-1]  # whatever a network of one layer has learned in a few steps
