"""Where text and conversations come from: the Hub, files, and the embedded default, each as a training and a held-out part."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from datasets.exceptions import DatasetsError

from a2d_core import embedded
from a2d_core.config import TrainConfig, UserError, require

EMBEDDED_ROWS = 50_000
"""Training conversations of `embedded:tasks`."""
BUILDERS = {".txt": "text", ".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}
"""File type -> builder of the datasets library. A .txt file is one document."""
ROLES = {"human": "user", "gpt": "assistant"}
"""Role names of ShareGPT data -> those of chat templates."""

Messages = list[dict[str, str]]


def load_documents(spec: str, config: TrainConfig, seed: int = 0) -> tuple[Dataset, Dataset]:
    """The (training, held-out) texts of a data set, each with the one column `config.text_field`.

    `spec` is a Hub id, a file (.txt, .jsonl, .json, .parquet, .csv), a directory of such files, one made by `save_to_disk`, or
    `embedded:corpus`. Held out is `config.eval_split`, or `eval_fraction` of the rows, drawn by `seed`; of a single
    document its end; `embedded:corpus` has its own. Raises `UserError` for a missing file, data set, split or column.
    """
    field = config.text_field
    parts = _load(spec, config, seed)
    for part in parts:
        _require_columns(part, spec, text_field=field)
        kind = part.features[field]
        is_text = getattr(kind, "dtype", None) in ("string", "large_string")
        require(is_text, f"column '{field}' of data set '{spec}' holds {kind}, not text: name a column of text as text_field")
    parts = tuple(part.select_columns([field]) for part in parts)
    if len(parts) == 1 and len(parts[0]) == 1:
        text = parts[0][0][field]
        end = len(text) - max(1, round(config.eval_fraction * len(text)))
        return Dataset.from_dict({field: [text[:end]]}), Dataset.from_dict({field: [text[end:]]})
    return _held_out(parts, spec, config, seed)


def load_conversations(spec: str, config: TrainConfig, seed: int = 0) -> tuple[Dataset, Dataset]:
    """The (training, held-out) conversations of a data set, each with the one column `messages` of {role, content}.

    `spec` and the held-out part are as in `load_documents`; `embedded:tasks` holds out its test words. The first of these
    that fits is read: `prompt_field` with `response_field`; `messages_field`, `messages` or `conversations`, with keys
    role/content or from/value (human, gpt); the Alpaca columns instruction, input (may be missing or empty) and output.
    """
    parts = tuple(_to_messages(part, spec, config) for part in _load(spec, config, seed))
    return _held_out(parts, spec, config, seed)


def _load(spec: str, config: TrainConfig, seed: int) -> tuple[Dataset, ...]:
    """The training part, and the held-out part where the data set or `eval_split` says what it is."""
    if spec.startswith("embedded:"):
        return _load_embedded(spec, config, seed)
    splits = filter(None, [config.train_split, config.eval_split])
    return tuple(_load_split(spec, config.dataset_config, split) for split in splits)


def _load_embedded(spec: str, config: TrainConfig, seed: int) -> tuple[Dataset, Dataset]:
    if spec == "embedded:corpus":
        train, held_out = embedded.corpus_split()
        return Dataset.from_dict({"text": list(train)}), Dataset.from_dict({"text": list(held_out)})
    require(spec == "embedded:tasks", f"unknown data set '{spec}': choose embedded:corpus (text) or embedded:tasks (conversations)")
    wanted = config.max_steps * config.batch_size * config.gradient_accumulation_steps
    rows = min(wanted, EMBEDDED_ROWS) if wanted > 0 else EMBEDDED_ROWS
    return Dataset.from_list(embedded.instructions("train", rows, seed)), Dataset.from_list(embedded.instructions("test"))


def _held_out(parts: tuple[Dataset, ...], spec: str, config: TrainConfig, seed: int) -> tuple[Dataset, Dataset]:
    """The two parts; where there is one, `eval_fraction` of its rows, at least one on both sides, are held out."""
    if len(parts) == 2:
        return parts
    rows = len(parts[0])
    require(
        rows >= 2, f"data set '{spec}' has {rows} rows in split '{config.train_split}', none to hold out: add rows, or name an eval_split"
    )
    count = min(max(1, round(config.eval_fraction * rows)), rows - 1)
    divided = parts[0].train_test_split(test_size=count, seed=seed)
    return divided["train"], divided["test"]


def _load_split(spec: str, dataset_config: str | None, split: str) -> Dataset:
    path = Path(spec).expanduser()
    if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
        dataset = load_from_disk(path)
        splits = dataset if isinstance(dataset, DatasetDict) else DatasetDict({split: dataset})
        require(split in splits, f"data set '{spec}' has no split '{split}': its splits are {', '.join(splits)}")
        return splits[split]
    source = _source(spec, path)
    try:
        return load_dataset(**source, name=dataset_config, split=split)
    except (OSError, ValueError, DatasetsError) as error:
        remedy = "" if path.exists() else (
            ". Check the name; for a gated or private data set set HF_TOKEN to a token of an account that may read it; "
            "without a network set HF_HUB_OFFLINE=1 and give a local file or directory"
        )  # fmt: skip
        raise UserError(f"cannot load split '{split}' of data set '{spec}': {error.__cause__ or error}{remedy}") from error


def _source(spec: str, path: Path) -> dict[str, Any]:
    """What `load_dataset` needs to know of a file, a directory, or a Hub id."""
    if path.is_file():
        require(path.suffix in BUILDERS, f"data file '{spec}' is of no known type: use one of {', '.join(BUILDERS)}")
        require(path.stat().st_size > 0, f"data file '{spec}' is empty")
        options = {"sample_by": "document"} if path.suffix == ".txt" else {}
        return {"path": BUILDERS[path.suffix], "data_files": {"train": [str(path)]}, **options}
    if path.is_dir():
        suffixes = {file.suffix for file in path.rglob("*") if file.suffix in BUILDERS}
        require(bool(suffixes), f"directory '{spec}' holds no data files: it needs some of {', '.join(BUILDERS)}")
        return {"path": str(path), **({"sample_by": "document"} if suffixes == {".txt"} else {})}
    looks_local = path.suffix in BUILDERS or spec.startswith(("/", ".", "~")) or spec.count("/") > 1
    require(not looks_local, f"data set '{spec}' does not exist: give an existing file or directory, or a Hub id such as owner/name")
    return {"path": spec}


def _require_columns(dataset: Dataset, spec: str, **fields: str) -> None:
    for option, column in fields.items():
        columns = ", ".join(dataset.column_names)
        require(column in dataset.column_names, f"data set '{spec}' has no column '{column}' ({option}): its columns are {columns}")


def _to_messages(dataset: Dataset, spec: str, config: TrainConfig) -> Dataset:
    read = _messages_reader(dataset, spec, config)

    def read_all(batch: dict[str, list[Any]]) -> dict[str, list[Messages]]:
        return {"messages": [read(dict(zip(batch, values, strict=True))) for values in zip(*batch.values(), strict=True)]}

    return dataset.map(read_all, batched=True, remove_columns=dataset.column_names, desc="reading conversations")


def _messages_reader(dataset: Dataset, spec: str, config: TrainConfig) -> Callable[[dict[str, Any]], Messages]:
    """The function that finds the messages in a row of this data set."""
    prompt, response = config.prompt_field, config.response_field
    if prompt and response:
        _require_columns(dataset, spec, prompt_field=prompt, response_field=response)
        return lambda row: _exchange(row[prompt], row[response])
    columns = dataset.column_names
    for field in (config.messages_field, "messages", "conversations"):
        if field in columns:
            role, content = _message_keys(dataset, field, spec)
            return lambda row: [_message(message[role], message[content]) for message in row[field] or []]
    if {"instruction", "output"} <= set(columns):
        return lambda row: _exchange("\n\n".join(filter(None, [row["instruction"], row.get("input")])), row["output"])
    raise UserError(
        f"data set '{spec}' has no column '{config.messages_field}': its columns are {', '.join(columns)}; "
        "name the one with messages as messages_field, or two as prompt_field and response_field"
    )


def _message_keys(dataset: Dataset, field: str, spec: str) -> tuple[str, str]:
    """The names of a message's role and of its content, read from the first conversation that has a message."""
    first = next((messages for messages in dataset[field] if messages), None)
    keys = set(first[0]) if isinstance(first, list) and isinstance(first[0], dict) else set()
    for names in (("role", "content"), ("from", "value")):
        if keys >= set(names):
            return names
    raise UserError(
        f"column '{field}' of data set '{spec}' holds {dataset.features[field]}: it must hold lists of role/content or from/value"
    )


def _exchange(prompt: str, response: str) -> Messages:
    return [_message("user", prompt), _message("assistant", response)]


def _message(role: str, content: str | None) -> dict[str, str]:
    return {"role": ROLES.get(role, role), "content": content or ""}
