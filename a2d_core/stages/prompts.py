"""Files of prompts, and of their answers: what is wrong in them is named by its line before any work; what was answered is kept.

A row is {"prompt": TEXT} or {"messages": [...]}, with further fields at will. An answered row also has what `ADDED` names.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from a2d_core.config import UserError, require

Row = dict[str, Any]
ADDED = ("index", "answer", "tokens", "nfe", "seconds", "finished", "digest")
"""Fields of an answered row: the prompt's place in its file, from 0; the answer; its new tokens; network evaluations; seconds
from its first to its last; whether it ended by itself, rather than at the token limit; and by what it is known when resumed."""


def read(path: Path, *, infill: bool = False) -> list[Row]:
    """The rows of a file of prompts; raises `UserError` that names the line where one is wrong."""
    require(path.is_file(), f"there is no prompt file '{path}'")
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"'{path}' is not text in UTF-8 ({error}): convert it") from None
    numbered = [(number, line.rstrip("\r")) for number, line in enumerate(lines, 1) if line.strip()]
    require(bool(numbered), f"'{path}' holds no prompts: write one per line")
    if path.suffix != ".jsonl":
        return [{"prompt": line} for _, line in numbered]
    return [_row(line, f"{path}, line {number}", infill) for number, line in numbered]


def _row(line: str, where: str, infill: bool) -> Row:
    form = f'{where}: it must be {{"prompt": TEXT}} or {{"messages": [{{"role": ..., "content": ...}}, ...]}}'
    try:
        found = json.loads(line)
    except ValueError as error:
        raise UserError(f"{form}, as JSON on one line ({error})") from None
    row: Row = {"prompt": found} if isinstance(found, str) else found
    require(isinstance(row, dict) and (("prompt" in row) != ("messages" in row)), f"{form}, with one of these two keys")
    taken = [name for name in ADDED if name in row]
    require(not taken, f"{where}: the field '{''.join(taken[:1])}' would be overwritten by the answer's own: give it another name")
    if "prompt" in row:
        require(isinstance(row["prompt"], str) and bool(row["prompt"].strip()), f"{form}: its prompt is {row['prompt']!r}")
        return row
    messages = row["messages"]
    require(not infill, f"{where}: gaps are filled in a text: give a prompt, not messages")
    is_list = isinstance(messages, list) and bool(messages)
    require(is_list and all(isinstance(m, dict) and all(isinstance(m.get(k), str) for k in ("role", "content")) for m in messages), form)
    require(
        messages[-1]["role"] != "assistant", f"{where}: its last message is the assistant's, so there is nothing to answer: leave it out"
    )
    return row


def digest(row: Row, settings: Any) -> str:
    """What a prompt and the settings of its answer are known by."""
    text = json.dumps([row.get("prompt"), row.get("messages"), settings], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def kept(path: Path, digests: Sequence[str]) -> dict[int, Row]:
    """Index -> answered row of an earlier output, where prompt and settings are still the same. A last line without its end is dropped.

    Raises `UserError` where another line is damaged.
    """
    found: dict[int, Row] = {}
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1] if path.is_file() else []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            index, is_same = row["index"], row["index"] < len(digests) and row["digest"] == digests[row["index"]]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path}, line {number} is no answered prompt ({error!r}): delete the line, or start anew with --overwrite"
            ) from None
        if is_same:
            found[index] = row
    return found


def write(path: Path, rows: Sequence[Row]) -> None:
    """Replace the file with these rows, at once."""
    arriving = path.with_name(path.name + ".arriving")
    arriving.write_text("".join(line(row) for row in rows), encoding="utf-8")
    arriving.replace(path)


def line(row: Row) -> str:
    """A row as its line in the file."""
    return json.dumps(row, ensure_ascii=False) + "\n"
