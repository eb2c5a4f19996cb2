"""Files of prompts: what is wrong is named by its line, an interrupted output is gone on from, and the replay shows what happened."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import fields, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
from families import byte_model

from a2d_core import replay, sampling
from a2d_core.config import SampleConfig, UserError
from a2d_core.stages import prompts, sample

CONFIG = SampleConfig(max_new_tokens=10, batch_size=2)
DRAWN = replace(CONFIG, temperature=1.0)
ROWS: list[dict[str, Any]] = [
    {"prompt": "Upper: sea", "id": "a"},
    {"messages": [{"role": "system", "content": "Be brief"}, {"role": "user", "content": "Last: sun"}]},
    {"prompt": "Reverse: a longer word", "id": "c"},
    {"prompt": "Sort: x"},
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    byte_model("bd3lm", max_position_embeddings=128).double().save(folder)
    return folder


@pytest.fixture(scope="module")
def mdlm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mdlm")
    byte_model("mdlm", max_position_embeddings=128).double().save(folder)
    return folder


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def answers(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


# --- reading ---------------------------------------------------------------------------------------


def test_prompts_are_read_from_text_and_json_lines_with_their_other_fields(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\ntwo\r\n")
    (tmp_path / "a.jsonl").write_text('"one"\n{"prompt": "two", "id": 3}\n\n' + json.dumps(ROWS[1]))
    assert prompts.read(tmp_path / "a.txt") == [{"prompt": "one"}, {"prompt": "two"}]
    assert prompts.read(tmp_path / "a.jsonl") == [{"prompt": "one"}, {"prompt": "two", "id": 3}, ROWS[1]]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "as JSON on one line"),
        ("7", "with one of these two keys"),
        ('{"question": "a"}', "with one of these two keys"),
        ('{"prompt": "a", "messages": []}', "with one of these two keys"),
        ('{"prompt": " "}', "its prompt is ' '"),
        ('{"prompt": 3}', "its prompt is 3"),
        ('{"messages": []}', "it must be"),
        ('{"messages": [{"role": "user"}]}', "it must be"),
        ('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}', "nothing to answer"),
        ('{"prompt": "a", "answer": "b"}', "the field 'answer' would be overwritten"),
    ],
)
def test_a_wrong_row_is_named_by_its_line(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "a.jsonl").write_text(f'"one"\n\n{line}\n')
    with pytest.raises(UserError, match=r"a\.jsonl, line 3: ") as error:
        prompts.read(tmp_path / "a.jsonl")
    assert message in str(error.value)


def test_files_without_prompts_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    for name, message in {"empty.jsonl": "holds no prompts", "latin.txt": "not text in UTF-8", "none.txt": "no prompt file"}.items():
        with pytest.raises(UserError, match=message):
            prompts.read(tmp_path / name)


# --- answering -------------------------------------------------------------------------------------


def test_answers_stand_in_the_prompts_order_with_their_other_fields(checkpoint: Path, tmp_path: Path) -> None:
    result = sample.run(CONFIG, checkpoint, tmp_path, rows=ROWS)
    rows = lines(tmp_path / "samples.jsonl")
    assert rows == result["samples"]
    assert [row["index"] for row in rows] == [0, 1, 2, 3]
    assert [{key: value for key, value in row.items() if key not in prompts.ADDED} for row in rows] == ROWS
    model = sample.models.load(checkpoint)
    alone = [sampling.generate(model, [sample._encode(model, CONFIG, row, 0)], CONFIG)[0] for row in ROWS]
    assert [(row["answer"], row["tokens"], row["nfe"], row["finished"]) for row in rows] == [
        (found.text, len(found.tokens), found.nfe, found.finished) for found in alone
    ]
    assert all(0 < row["seconds"] <= result["seconds"] for row in rows)


@pytest.mark.parametrize("config", [CONFIG, DRAWN], ids=["greedy", "drawn"])
@pytest.mark.parametrize("left", [0, 1.5, 2, 4])
def test_resumed_equals_uninterrupted(checkpoint: Path, tmp_path: Path, config: SampleConfig, left: float) -> None:
    whole, broken = tmp_path / "whole.jsonl", tmp_path / "broken.jsonl"
    sample.run(config, checkpoint, whole, rows=ROWS, seed=5)
    full = whole.read_text().splitlines(keepends=True)
    order = [full[2], full[0], full[1], full[3]]  # as they happened to be finished
    broken.write_text("".join(order[: int(left)]) + order[-1][: int(left % 1 * 40)])
    result = sample.run(config, checkpoint, broken, rows=ROWS, seed=5, resume=True)
    assert (result["skipped"], result["answered"]) == (int(left), 4 - int(left))
    assert answers(lines(broken)) == answers(lines(whole))


def test_each_answer_is_written_when_it_is_there(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = sampling.stream

    def breaks(*args: Any, **options: Any) -> Any:
        for number, event in enumerate(event for event in stream(*args, **options)):
            yield event
            if event.generation is not None and number:
                raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(sampling, "stream", breaks)
        with pytest.raises(KeyboardInterrupt):
            sample.run(CONFIG, checkpoint, tmp_path, rows=ROWS)
    assert len(lines(tmp_path / "samples.jsonl")) == 1
    assert sample.run(CONFIG, checkpoint, tmp_path, rows=ROWS, resume=True)["skipped"] == 1


def test_answers_to_other_prompts_or_with_other_settings_are_not_kept(checkpoint: Path, tmp_path: Path) -> None:
    sample.run(CONFIG, checkpoint, tmp_path, rows=ROWS)

    def skipped(config: SampleConfig = CONFIG, rows: list[dict[str, Any]] = ROWS, seed: int = 0) -> int:
        shutil.copy(tmp_path / "samples.jsonl", tmp_path / "copy.jsonl")
        return int(sample.run(config, checkpoint, tmp_path / "copy.jsonl", rows=rows, seed=seed, resume=True)["skipped"])

    assert skipped(replace(CONFIG, batch_size=3)) == 4
    assert skipped(replace(CONFIG, threshold=0.5)) == skipped(seed=1) == 0
    assert skipped(rows=[*ROWS[:2], {"prompt": "other"}, ROWS[3]]) == 3
    assert skipped(rows=ROWS[:2]) == 2


def test_a_damaged_output_is_named_and_a_prompt_that_does_not_fit_too(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "o.jsonl").write_text('{"index": 0}\n')
    with pytest.raises(UserError, match=r"o.jsonl, line 1 is no answered prompt"):
        sample.run(CONFIG, checkpoint, tmp_path / "o.jsonl", rows=ROWS, resume=True)
    with pytest.raises(UserError, match=r"prompt 2 with its answer needs .* the model's context is 128"):
        sample.run(CONFIG, checkpoint, tmp_path / "p.jsonl", rows=[ROWS[0], {"prompt": "x" * 128}])
    with pytest.raises(UserError, match="prompt 2 is a list of messages"):
        sample.run(replace(CONFIG, chat=False), checkpoint, tmp_path / "p.jsonl", rows=ROWS)
    assert not (tmp_path / "p.jsonl").exists()


@pytest.mark.parametrize("config", [CONFIG, DRAWN], ids=["greedy", "drawn"])
def test_gaps_are_filled_and_resumed(mdlm: Path, tmp_path: Path, config: SampleConfig) -> None:
    rows = [{"prompt": f"ab<mask:{n}>c<mask:1-2>d"} for n in (1, 2, 3)]
    sample.run(config, mdlm, tmp_path, rows=rows, infill=True)
    found = lines(tmp_path / "samples.jsonl")
    assert all(row["answer"] == f"ab{row['gaps'][0]}c{row['gaps'][1]}d" for row in found)
    (tmp_path / "broken.jsonl").write_text(json.dumps(found[1]) + "\n")
    sample.run(config, mdlm, tmp_path / "broken.jsonl", rows=rows, infill=True, resume=True)
    assert answers(lines(tmp_path / "broken.jsonl")) == answers(found)


# --- the replay ------------------------------------------------------------------------------------


class Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def recorded(page: str) -> dict[str, Any]:
    (data,) = re.findall(r"^const DATA = (.*);$", page, re.MULTILINE)
    return json.loads(data)


@pytest.mark.parametrize("config", [replace(CONFIG, threshold=0.3), replace(CONFIG, steps_per_block=3, remasking=0.5)])
def test_the_replayed_tokens_are_the_answer(checkpoint: Path, tmp_path: Path, config: SampleConfig) -> None:
    result = sample.run(config, checkpoint, tmp_path, rows=ROWS, animate=tmp_path / "a.html")
    data = recorded((tmp_path / "a.html").read_text())
    for row, shown in zip(result["samples"], data["answers"], strict=True):
        tokens: dict[int, int] = {}
        for _, revealed, remasked in shown["frames"]:
            tokens |= {position: token for position, token, _ in revealed}
            tokens = {position: token for position, token in tokens.items() if position not in remasked}
            assert all(0 < p <= 1 for _, _, p in revealed)
        assert shown["frames"][-1][0] == row["nfe"] and shown["kept"] == row["tokens"] and shown["answer"] == row["answer"]
        model = sample.models.load(checkpoint)
        assert model.tokenizer.decode([tokens[i] for i in range(shown["kept"])], skip_special_tokens=True) == row["answer"]
        assert shown["blocks"][0][0] == 0 and shown["blocks"][-1][1] == config.max_new_tokens
        assert {str(token) for token in tokens.values()} <= set(data["tokens"])


def test_the_page_needs_nothing_else_and_stays_small(checkpoint: Path, tmp_path: Path) -> None:
    evil = {"prompt": "</script><img src=x onerror=alert(1)>"}
    sample.run(replace(CONFIG, max_new_tokens=60), checkpoint, tmp_path, rows=[evil, *ROWS], animate=tmp_path / "a.html")
    text = (tmp_path / "a.html").read_text()
    page = Page()
    page.feed(text)
    assert len(text.encode()) < 100_000
    assert not re.findall(r"https?://|@import|url\(", text)
    assert [tag for tag, _ in page.tags].count("script") == 1 and "img" not in [tag for tag, _ in page.tags]
    assert not [attrs for _, attrs in page.tags if attrs.keys() & {"src", "href"}]
    controls = [(tag, attrs) for tag, attrs in page.tags if tag == "input"]
    assert all(attrs.get("aria-label") for _, attrs in controls)
    assert recorded(text)["answers"][0]["prompt"] == evil["prompt"]


def test_only_the_first_prompts_are_replayed(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "MAX_TOKENS", 25)
    sample.run(CONFIG, checkpoint, tmp_path, rows=ROWS, animate=tmp_path / "a.html")
    assert [answer["prompt"] for answer in recorded((tmp_path / "a.html").read_text())["answers"]] == ["Upper: sea", "Last: sun"]
    with pytest.raises(UserError, match="nothing is left to replay"):
        sample.run(CONFIG, checkpoint, tmp_path, rows=ROWS, animate=tmp_path / "b.html", resume=True)


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node, to run the page's script")
def test_the_script_of_the_page_parses(tmp_path: Path) -> None:
    (tmp_path / "page.js").write_text(re.findall(r"<script>(.*)</script>", replay.TEMPLATE.read_text(), re.DOTALL)[0])
    done = subprocess.run(["node", "--check", str(tmp_path / "page.js")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# --- the documentation -----------------------------------------------------------------------------


def test_every_option_and_policy_and_field_is_documented() -> None:
    page = (Path(__file__).resolve().parents[1] / "docs" / "SAMPLING.md").read_text(encoding="utf-8")
    told = {name for row in re.findall(r"^\| (.*?) \|", page, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)}
    policies = get_args(get_type_hints(SampleConfig)["policy"])
    assert told >= {field.name for field in fields(SampleConfig) if field.name != "enabled"} | set(policies) | set(prompts.ADDED)
    for image in re.findall(r"\]\((images/.*?)\)", page):
        assert (Path(__file__).resolve().parents[1] / "docs" / image).stat().st_size < 150_000
