"""Where the text or the conversation stands in a row: the known data sets, the usual layouts, and what the configuration names."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Value

from a2d_core.config import TrainConfig, UserError, require
from a2d_core.data.cache import fingerprint, processes

BUILDERS = {".txt": "text", ".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}
"""File type -> builder of the datasets library. A .txt file is one document."""
ROLES = {"human": "user", "gpt": "assistant"}
"""Role names of ShareGPT data -> those of chat templates."""
TEXT = Features({"text": Value("string")})
MESSAGES = Features({"messages": [{"role": Value("string"), "content": Value("string")}]})

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Reader:
    """Where things stand in one kind of data set: either `text`, or `messages`, or `prompt` and `response`."""

    text: str | None = None
    """Column with a document."""
    messages: str | None = None
    """Column with a list of messages."""
    prompt: str | None = None
    """Column with the prompt."""
    response: str | None = None
    """Column with the answer."""
    context: str | None = None
    """Column whose text stands below the prompt, where it is there and not empty."""
    configs: tuple[str, ...] = ()
    """Configurations (subsets) that are read, all of them, where the user names none."""
    eval_split: str | None = None
    """Split that is held out, where the user names none."""
    contains: dict[str, str] = field(default_factory=dict)
    """Filter that is no column -> the column that must contain its value."""

    def columns(self) -> dict[str, str]:
        """Role -> column, of all that must be there."""
        return {role: column for role in ("text", "messages", "prompt", "response") if (column := getattr(self, role))}


ALPACA = Reader(prompt="instruction", context="input", response="output")
OPEN_CODER = Reader(prompt="instruction", response="output", contains={"lang": "output"})  # has no column with the language
READERS = {
    "tiny-shakespeare": Reader(text="Text", eval_split="test"),
    "openwebtext": Reader(text="text"),
    "alpaca": ALPACA,
    "tulu-3-sft-mixture": Reader(messages="messages"),
    "smoltalk": Reader(messages="messages", configs=("all",), eval_split="test"),
    "opc-sft-stage1": dataclasses.replace(
        OPEN_CODER, configs=("filtered_infinity_instruct", "largescale_diverse_instruct", "realuser_instruct")
    ),
    "opc-sft-stage2": dataclasses.replace(
        OPEN_CODER, configs=("educational_instruct", "evol_instruct", "mceval_instruct", "package_instruct")
    ),
    "gsm8k": Reader(prompt="question", response="answer", configs=("main",), eval_split="test"),
}
"""Known data sets, by their names without the owner. Whatever the configuration names wins."""
LAYOUTS = (Reader(messages="messages"), Reader(messages="conversations"), ALPACA)
"""Of any other data set with conversations, the first of these that fits."""


def known(ref: str) -> Reader | None:
    """The reader of a data set of that name: a Hub id, a directory, or a file."""
    path = Path(ref)
    return READERS.get(path.stem if path.suffix in BUILDERS else path.name)


def text_column(columns: Iterable[str], ref: str, config: TrainConfig) -> str:
    """The column with the text; raises `UserError` where there is none."""
    reader = Reader(text=config.text_field) if config.text_field else known(ref) or Reader(text="text")
    columns = list(columns)
    if reader.text is None or (reader.text not in columns and any(set(layout.columns().values()) <= set(columns) for layout in LAYOUTS)):
        raise UserError(
            f"data set '{ref}' holds conversations (its columns are {', '.join(columns)}), and text is needed: use it for sft, "
            "or name a column of text as text_field. Text and conversations do not mix in one stage"
        )
    require_columns(columns, ref, text_field=reader.text)
    return reader.text


def read_documents(dataset: Dataset, ref: str, config: TrainConfig) -> Dataset:
    """The data set's texts, in the one column `text`; raises `UserError` where it has none."""
    column = text_column(dataset.column_names, ref, config)
    kind = dataset.features[column]
    is_text = getattr(kind, "dtype", None) in ("string", "large_string")
    require(is_text, f"column '{column}' of data set '{ref}' holds {kind}, not text: name a column of text as text_field")
    dataset = dataset.select_columns([column]).rename_column(column, "text") if column != "text" else dataset.select_columns(["text"])
    return dataset if dataset.features == TEXT else dataset.cast(TEXT)


def read_conversations(dataset: Dataset, ref: str, config: TrainConfig) -> Dataset:
    """The data set's conversations, in the one column `messages`, a list of {role, content}; raises `UserError` where it has none."""
    reader = _conversation_reader(dataset.column_names, ref, config)
    keys = _message_keys(dataset, reader.messages, ref) if reader.messages else ("", "")

    def read(row: dict[str | None, Any]) -> Messages:
        if reader.messages:
            return [_message(message[keys[0]], message[keys[1]]) for message in row[reader.messages] or []]
        prompt = "\n\n".join(filter(None, [row[reader.prompt], row.get(reader.context)]))
        return [_message("user", prompt), _message("assistant", row[reader.response])]

    def read_all(batch: dict[str, list[Any]]) -> dict[str, list[Messages]]:
        return {"messages": [read(dict(zip(batch, values, strict=True))) for values in zip(*batch.values(), strict=True)]}

    return dataset.map(
        read_all,
        batched=True,
        num_proc=processes(config.num_workers),
        remove_columns=dataset.column_names,
        features=MESSAGES,
        new_fingerprint=fingerprint(dataset, "read", dataclasses.asdict(reader), keys),
        desc="reading conversations",
    )


def require_columns(columns: Iterable[str], ref: str, **fields: str) -> None:
    """Raise `UserError` unless each column is there; the keywords are the fields of the configuration that name them."""
    columns = list(columns)
    for option, column in fields.items():
        require(column in columns, f"data set '{ref}' has no column '{column}' ({option}): its columns are {', '.join(columns)}")


def _conversation_reader(columns: list[str], ref: str, config: TrainConfig) -> Reader:
    if config.prompt_field or config.messages_field:
        reader: Reader | None = Reader(
            prompt=config.prompt_field, response=config.response_field, messages=None if config.prompt_field else config.messages_field
        )
    else:
        reader = known(ref) or next((layout for layout in LAYOUTS if set(layout.columns().values()) <= set(columns)), None)
    require(
        reader is None or reader.text is None,
        f"data set '{ref}' holds text, and conversations are needed: use it for pretrain. Text and conversations do not mix in one stage",
    )
    if reader is None:
        raise UserError(
            f"data set '{ref}' has no column 'messages': its columns are {', '.join(columns)}; "
            "name the one with messages as messages_field, or two as prompt_field and response_field"
        )
    require_columns(columns, ref, **{f"{role}_field": column for role, column in reader.columns().items()})
    return reader


def _message_keys(dataset: Dataset, column: str, ref: str) -> tuple[str, str]:
    """The names of a message's role and of its content, read from the first conversation that has a message."""
    first = next((row[column] for row in dataset.select_columns([column]) if row[column]), None)
    keys = set(first[0]) if isinstance(first, list) and isinstance(first[0], dict) else set()
    for names in (("role", "content"), ("from", "value")):
        if keys >= set(names):
            return names
    raise UserError(
        f"column '{column}' of data set '{ref}' holds {dataset.features[column]}: it must hold lists of role/content or from/value"
    )


def _message(role: str, content: str | None) -> dict[str, str]:
    return {"role": ROLES.get(role, role), "content": content or ""}
