"""The benchmarks' common part: what they share, and the page that is made of their output."""

from __future__ import annotations

import importlib
import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import write  # noqa: E402  (a folder of scripts, no package)

SCRIPTS = sorted(path.stem for path in (ROOT / "benchmarks").glob("*.py") if path.stem not in ("shared", "write"))
OUTPUT = 'method  speed\nplain       1\nours        3\n{"ratios": {"speed": 3.0}}\n'


def test_every_benchmark_has_its_part_of_the_page() -> None:
    assert sorted(write.TITLES) == SCRIPTS
    titles = re.findall(r"^## (.*)$", write.PAGE.read_text(), re.MULTILINE)
    assert titles == [title for title in write.TITLES.values() if title in titles]


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_benchmark_has_a_quick_form_and_says_how_it_is_run(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = importlib.import_module(name)
    monkeypatch.setattr(sys, "argv", [f"benchmarks/{name}.py", "--help"])
    with pytest.raises(SystemExit, match="0"):
        script.main()
    told = " ".join(capsys.readouterr().out.split())
    assert f"python benchmarks/{name}.py" in told and "--quick" in told and "--output-dir" in told and "under 5 minutes" in told


def test_a_part_has_the_words_the_table_and_the_ratios() -> None:
    part = write.part("sampling", OUTPUT, 12.4, False, [])
    assert part.startswith("## Sampling cost\n") and "ours        3\n```" in part and "speed **3.0**" in part
    assert "`python benchmarks/sampling.py`" in part and "12 min" in part and "{" not in part.split("```")[2]


def test_other_parts_of_the_page_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write, "PAGE", tmp_path / "page.md")
    write.update({name: write.part(name, OUTPUT, 1, False, []) for name in ("variance", "training")})
    before = write.PAGE.read_text()
    write.update({"training": write.part("training", OUTPUT.replace("3", "4"), 1, False, [])})
    after = write.PAGE.read_text()
    assert re.findall("^## (.*)$", after, re.MULTILINE) == [write.TITLES["training"], write.TITLES["variance"]]
    assert before.split(f"## {write.TITLES['variance']}")[1] == after.split(f"## {write.TITLES['variance']}")[1]
    assert "speed **4.0**" in after and json.loads(OUTPUT.splitlines()[-1])["ratios"] == {"speed": 3.0}


def test_a_benchmark_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["write.py", "trainnig"])
    with pytest.raises(SystemExit, match="2"):
        write.main()
    assert "no benchmark 'trainnig': there are training" in capsys.readouterr().err
