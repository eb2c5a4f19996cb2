"""The command line: what it takes, what it refuses before any work, and each stage for real on the smoke model."""

import dataclasses
import io
import json
import os
import signal
import sys

import pytest

from a2d_core import __main__ as cli
from a2d_core import chat, commands
from a2d_core.config import Recipe, SampleConfig, UserError
from a2d_core.stages import checks


@pytest.fixture
def run(capsys):
    """Run a command in this process; returns (exit code, standard output, standard error)."""

    def run(*arguments):
        try:
            code = cli.main([str(argument) for argument in arguments])
        except SystemExit as exit:  # argparse's own
            code = exit.code
        return (code, *capsys.readouterr())

    return run


@pytest.fixture
def fails(run):
    """Run a command that is refused: exit code 2, and one line that starts with `error:`, which is returned."""

    def fails(*arguments):
        code, out, err = run(*arguments)
        assert (code, out) == (2, "")
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        return err

    return fails


@pytest.fixture
def checkpoint(tmp_path):
    """A directory that says of itself that it is a bd3lm checkpoint with blocks of 16."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"a2d": {"objective": "bd3lm", "block_size": 16}}))
    return folder


# --- help ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", commands.USES)
def test_help_lists_every_field_that_the_command_takes(run, command):
    code, out, _ = run(command, "--help")
    assert code == 0
    for stage in commands.USES[command]:
        for field in dataclasses.fields(getattr(Recipe, stage)):
            name = field.name if stage == commands.USES[command][0] else f"{stage}.{field.name}"
            is_read = field.name != "enabled" and f"{stage}.{field.name}" not in commands.UNREAD.get(command, {})
            assert (f"\n  {name}=" in out) == is_read, name


def test_help_is_for_strangers(run):
    _, out, _ = run("sft", "--help")
    assert "  learning_rate=0.0001  (number)\n      Peak learning rate of AdamW.\n" in out
    assert '  schedule="linear"  (one of linear, cosine)\n' in out
    assert '  dataset="embedded:tasks"  (text)\n' in out
    assert "tuple" not in out


def test_a_command_is_needed(run):
    code, _, err = run()
    assert code == 2
    assert "COMMAND" in err


def test_the_presets_are_listed(run):
    code, out, _ = run("presets")
    assert code == 0
    assert {line.split()[0] for line in out.splitlines() if line[0] != " "} >= {"default", "tiny", "smoke", "qwen3-0.6b-8gpu"}


def test_a_plan_is_a_recipe(run, tmp_path):
    code, out, _ = run("plan", "--preset", "tiny", "--objective", "mdlm", "--set", "sft.max_steps=7", "--seed", 3)
    assert code == 0
    plain = json.loads(out[: out.index("\n}") + 2])
    assert (plain["seed"], plain["sft"]["max_steps"]) == (3, 7)
    assert "FLOPs" in out
    (tmp_path / "plan.json").write_text(json.dumps(plain))
    assert run("plan", "--preset", tmp_path / "plan.json", "--objective", "mdlm") == (0, out, "")


# --- what is refused before any work ----------------------------------------------------------------


def test_a_mistake_in_the_recipe_is_refused(fails, checkpoint, tmp_path):
    sft = ("sft", "--model", checkpoint, "--output-dir", tmp_path / "out")
    assert "unknown preset 'tinny': did you mean 'tiny'" in fails(*sft, "--preset", "tinny")
    assert "unknown field 'sft.max_step': did you mean 'max_steps'" in fails(*sft, "--set", "max_step=3")
    assert "unknown field 'sft.max_step': did you mean 'max_steps'" in fails(*sft, "--set", "sft.max_step=3")
    assert "is not of the form stage.field=value" in fails(*sft, "--set", "max_steps")
    assert "sft: batch_size must be at least 1, not 0" in fails(*sft, "--set", "batch_size=0")
    assert "reads the fields of sft, not of 'pretrain'" in fails(*sft, "--set", "pretrain.max_steps=3")
    assert "does not read sft.enabled" in fails(*sft, "--set", "enabled=false")
    assert "does not read sample.prompts (type the prompt)" in fails("chat", "--model", checkpoint, "--set", "prompts=hello")
    assert "right_shift=true does not fit bd3lm" in fails("convert", "--output-dir", tmp_path / "out", "--set", "right_shift=true")
    assert not (tmp_path / "out").exists()


def test_a_mistake_in_the_command_line_is_one_line_with_what_was_meant(fails, checkpoint, tmp_path):
    assert "unknown option '--datset': did you mean '--dataset'?" in fails("sft", "--model", checkpoint, "--datset", "x")
    assert "unknown option '--modle': did you mean '--model'?" in fails("sft", "--modle", checkpoint)
    assert "invalid choice: 'bd3ml' (choose from 'mdlm', 'bd3lm')" in fails("convert", "--objective", "bd3ml", "--output-dir", "x")
    assert "invalid choice: 'chatt'" in fails("chatt")
    told = ["sample", "--model", "x", "--output-dir", "y", "--prompt", "--- a poem", "--over"]
    assert cli.parser().parse_args(told).prompt == ["--- a poem"]


def test_a_review_makes_no_database(fails, tmp_path):
    assert "there is no MLflow database" in fails("registry", "review", "name", "--mlflow", f"sqlite:///{tmp_path}/none.db")
    assert not list(tmp_path.iterdir())


def test_rows_must_hold_whole_blocks_of_the_checkpoint(fails, checkpoint, tmp_path):
    sft = ("sft", "--model", checkpoint, "--output-dir", tmp_path / "out")
    assert "max_length=100 is not a multiple of convert.block_size=16: use 96" in fails(*sft, "--set", "max_length=100")


def test_processes_that_cannot_meet_are_refused(fails, checkpoint, tmp_path):
    sft = ("sft", "--model", checkpoint, "--output-dir", tmp_path / "out")
    assert "unknown strategy 'zero9'" in fails(*sft, "--strategy", "zero9")
    assert "2 nodes need the address of node 0 as HOST:PORT, not None" in fails(*sft, "--nodes", 2)
    assert "node_rank=2 is none of 0 to 1" in fails(*sft, "--nodes", 2, "--node-rank", 2, "--main-address", "a:1")
    assert not (tmp_path / "out").exists()


def test_a_model_must_be_a_diffusion_checkpoint(fails, checkpoint, tmp_path):
    out = ("--output-dir", tmp_path / "out")
    assert "there is no directory 'nowhere'" in fails("sft", "--model", "nowhere", *out)
    (checkpoint / "config.json").write_text("{}")
    assert "is not a diffusion checkpoint" in fails("sft", "--model", checkpoint, *out)
    (checkpoint / "config.json").write_text("{")
    assert "config.json is not the JSON of a Hugging Face model" in fails("sft", "--model", checkpoint, *out)


def test_the_objective_is_the_checkpoints_own(fails, checkpoint, tmp_path):
    err = fails("sft", "--model", checkpoint, "--output-dir", tmp_path / "out", "--objective", "mdlm")
    assert f"--objective mdlm: '{checkpoint}' is a checkpoint for bd3lm" in err


def test_an_output_directory_must_be_free(fails, checkpoint, tmp_path):
    sft = ("sft", "--model", checkpoint, "--output-dir")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("keep me")
    assert "full' is not empty: choose another, or replace what is in it with --overwrite" in fails(*sft, tmp_path / "full")
    assert "does not look like the output of a stage" in fails(*sft, tmp_path / "full", "--overwrite")
    assert "mine.txt' is a file" in fails(*sft, tmp_path / "full" / "mine.txt")
    assert "would delete" in fails(*sft, tmp_path, "--overwrite")
    assert (tmp_path / "full" / "mine.txt").read_text() == "keep me"
    assert "holds no checkpoint to resume from" in fails(*sft, tmp_path / "full", "--resume")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_an_output_directory_must_be_writable(fails, checkpoint, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o555)
    assert "cannot write to output directory" in fails("sft", "--model", checkpoint, "--output-dir", tmp_path / "locked" / "out")


def test_an_output_directory_that_cannot_be_made_is_refused(fails, checkpoint):
    assert "cannot write to output directory '/proc/a2d'" in fails("sft", "--model", checkpoint, "--output-dir", "/proc/a2d")


def test_what_cannot_be_sampled_is_refused(tmp_path, fails, checkpoint):
    (tmp_path / "b.jsonl").write_text('{"question": "two"}\n')
    (tmp_path / "there.jsonl").write_text("")
    sample = ("sample", "--model", checkpoint)
    out = ("--output-dir", tmp_path / "out")
    assert "b.jsonl, line 1: it must be" in fails(*sample, *out, "--prompts", tmp_path / "b.jsonl")
    assert "there is no prompt file" in fails(*sample, *out, "--prompts", tmp_path / "c.jsonl")
    assert "give a file with the ending .jsonl" in fails(*sample, "--output", tmp_path / "a.txt")
    assert "continue it with --resume, replace it with --overwrite" in fails(*sample, "--output", tmp_path / "there.jsonl")
    assert "give a file .html in a folder that exists" in fails(*sample, *out, "--animate", tmp_path / "none" / "a.html")
    assert "replays answers, not infills" in fails(*sample, *out, "--infill", "--animate", tmp_path / "a.html")
    assert "there is no MLflow database" in fails("chat", "--model", "models:/name/1")
    assert "--pace -1.0: give seconds" in fails("chat", "--model", checkpoint, "--pace", -1)
    assert not (tmp_path / "out").exists()


def test_an_mlflow_server_that_does_not_answer_is_named(fails, checkpoint, tmp_path):
    err = fails("sft", "--model", checkpoint, "--output-dir", tmp_path / "out", "--mlflow", "http://127.0.0.1:9")
    assert "MLflow does not answer at http://127.0.0.1:9" in err


def test_full_memory_ends_with_one_message(run, checkpoint, tmp_path, monkeypatch):
    import torch

    from a2d_core.stages import convert

    def convert_run(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr(convert, "run", convert_run)
    code, _, err = run("convert", "--output-dir", tmp_path / "out")
    assert code == 1
    assert err.startswith("error: CUDA ran out of memory in convert")


def test_ctrl_c_ends_with_a_word_instead_of_a_traceback(run, checkpoint, tmp_path, monkeypatch):
    from a2d_core.stages import convert, sft

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(convert, "run", interrupted)
    monkeypatch.setattr(sft, "run", interrupted)
    assert run("convert", "--output-dir", tmp_path / "c") == (130, "", "\nstopped\n")
    sft_command = ("sft", "--model", checkpoint, "--output-dir", tmp_path / "s")
    assert run(*sft_command) == (130, "", "\nstopped: the same command with --resume continues\n")


def test_a_missing_package_is_told_with_the_way_to_it(run, tmp_path, monkeypatch):
    from a2d_core.stages import convert

    def without_torch(*_, **__):
        raise ModuleNotFoundError("No module named 'torch'", name="torch")

    monkeypatch.setattr(convert, "run", without_torch)
    code, _, err = run("convert", "--output-dir", tmp_path / "out")
    assert code == 1
    assert err.startswith("error: No module named 'torch': install requirements.txt, or activate its environment")


# --- for real ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Directories of a smoke run: converted `c`, pretrained `p`, fine-tuned `s`."""
    folder = tmp_path_factory.mktemp("runs")
    smoke = ("--preset", "smoke", "--output-dir")
    assert cli.main(["convert", *smoke, str(folder / "c")]) == 0
    assert cli.main(["pretrain", *smoke, str(folder / "p"), "--model", str(folder / "c")]) == 0
    assert cli.main(["sft", *smoke, str(folder / "s"), "--model", str(folder / "p" / "checkpoint-final"), "--set", "max_steps=3"]) == 0
    return folder


def test_each_stage_leaves_its_result(trained):
    assert checks.read_spec(trained / "c")["block_size"] == 8
    chain = checks.read_spec(trained / "s" / "checkpoint-final")["chain"]
    assert [record["stage"] for record in chain] == ["convert", "pretrain", "sft"]
    assert chain[2]["config"]["max_steps"] == 3
    assert checks.parameters(trained / "s" / "checkpoint-final") > 0


def test_samples_are_told_and_written(run, trained, tmp_path):
    model = trained / "s" / "checkpoint-final"
    code, out, _ = run("sample", "--model", model, "--output-dir", tmp_path, "--prompt", "Upper: sea", "--set", "max_new_tokens=8")
    assert code == 0
    assert out.startswith("Upper: sea\n")
    rows = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == ["Upper: sea"]


def test_a_file_of_prompts_is_answered_gone_on_with_and_replaced(run, trained, tmp_path):
    (tmp_path / "p.jsonl").write_text("".join(f'{{"prompt": "Upper: {word}", "id": {n}}}\n' for n, word in enumerate("abcdefghij")))
    sample = ("sample", "--model", trained / "s" / "checkpoint-final", "--set", "max_new_tokens=8", "--prompts", tmp_path / "p.jsonl")
    code, out, _ = run(*sample, "--output", tmp_path / "o.jsonl", "--animate", tmp_path / "o.html")
    assert code == 0 and (tmp_path / "o.html").stat().st_size < 100_000
    assert "10 prompts answered, 0 skipped" in out and out.count("evaluations") == commands.SHOWN
    rows = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == list(range(10))
    (tmp_path / "o.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[3:]))
    assert "3 prompts answered, 7 skipped" in run(*sample, "--output", tmp_path / "o.jsonl", "--resume")[1]
    assert "10 prompts answered, 0 skipped" in run(*sample, "--output", tmp_path / "o.jsonl", "--overwrite")[1]


def test_scores_are_told_and_written(run, trained, tmp_path):
    model, baseline = trained / "s" / "checkpoint-final", trained / "c"
    smoke = ("evaluate", "--preset", "smoke", "--output-dir", tmp_path / "out", "--model", model)
    code, out, _ = run(*smoke, "--tasks", "words_sort,words_last", "--dataset", "none", "--baseline", baseline)
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()[:2]] == ["words_sort", "words_last"]
    assert "baseline 0." in out.splitlines()[0]
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["text"] is None
    assert [task["documents"] for task in results["tasks"]] == [2, 2]


def test_an_interrupted_training_is_resumed(run, trained, tmp_path):
    sft = ("sft", "--preset", "smoke", "--model", trained / "c", "--output-dir", tmp_path / "out")
    assert run(*sft)[0] == 0
    for name in ("checkpoint-4", "checkpoint-final"):
        (tmp_path / "out" / name).rename(tmp_path / name)
    assert run(*sft, "--resume")[0] == 0
    final = [(folder / "checkpoint-final" / "model.safetensors").read_bytes() for folder in (tmp_path, tmp_path / "out")]
    assert final[0] == final[1]


def test_a_training_that_sigterm_stopped_is_resumed(run, trained, tmp_path, monkeypatch):
    from a2d_core import trainer

    sft = ("sft", "--preset", "smoke", "--model", trained / "c", "--output-dir")
    assert run(*sft, tmp_path / "straight")[0] == 0
    step = trainer.DiffusionTrainer.training_step
    with monkeypatch.context() as patch:
        patch.setattr(trainer.DiffusionTrainer, "training_step", lambda *args: (os.kill(os.getpid(), signal.SIGTERM), step(*args))[1])
        code, _, told = run(*sft, tmp_path / "out")
    assert code == 143
    assert f"stopped by SIGTERM at step 1 of 4, with nothing lost: the last good checkpoint is '{tmp_path}/out/checkpoint-1'" in told
    assert run(*sft, tmp_path / "out", "--resume")[0] == 0
    final = [(tmp_path / name / "checkpoint-final" / "model.safetensors").read_bytes() for name in ("straight", "out")]
    assert final[0] == final[1]


def test_training_is_tracked_where_it_is_asked_for(run, trained, tmp_path, request):
    import mlflow

    request.addfinalizer(lambda: mlflow.set_tracking_uri(""))
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    assert run("sft", "--preset", "smoke", "--model", trained / "c", "--output-dir", tmp_path / "out", "--mlflow", uri)[0] == 0
    runs = mlflow.MlflowClient(uri).search_runs(["1"])
    child = next(run for run in runs if run.data.tags.get("a2d.stage") == "sft")
    assert child.data.params["max_steps"] == "4"
    assert {"loss", "eval_nelbo", "learning_rate"} <= set(child.data.metrics)
    assert all(run.info.status == "FINISHED" for run in runs)


def test_a_chat_in_a_pipe_is_one_line_in_and_one_answer_out(run, trained, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("Upper: sea\n\n/reset\nLast: sun\n/quit\nUpper: air\n"))
    code, out, _ = run("chat", "--model", trained / "s" / "checkpoint-final", "--set", "max_new_tokens=8")
    assert code == 0
    monkeypatch.setattr(sys, "stdin", io.StringIO("Last: sun"))
    assert out.endswith(run("chat", "--model", trained / "s" / "checkpoint-final", "--set", "max_new_tokens=8")[1])


def test_a_chat_remembers_until_it_is_full_and_forgets_on_reset(trained):
    from a2d_core import models

    model = models.load(trained / "s" / "checkpoint-final")
    conversation = chat.Chat(model, SampleConfig(max_new_tokens=8))
    for turn in range(3):
        assert len(conversation.messages) == 2 * turn
        assert conversation.answer("Upper: sea").tokens <= 8
    conversation.answer("x" * 450)  # of 512 positions: the oldest turns have to go
    assert [m["content"] for m in conversation.messages if m["role"] == "user"][-1] == "x" * 450
    assert len(conversation._prompt(conversation.messages[:-1])) <= 512 - 8
    conversation.reset()
    assert conversation.messages == []
    with pytest.raises(UserError, match="context"):
        conversation.answer("x" * 600)
    model.tokenizer.chat_template = None
    with pytest.raises(UserError, match="use --raw"):
        chat.Chat(model, SampleConfig())
    assert chat.Chat(model, SampleConfig(max_new_tokens=8), raw=True)._prompt([{"role": "user", "content": "sea"}]) == list(
        model.tokenizer("sea")["input_ids"]
    )
