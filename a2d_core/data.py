"""From text and conversations to rows of tokens, and from rows to batches.

Load (`load_documents`, `load_conversations`: a training and a held-out part), make rows (`pretraining_rows`,
`conversation_rows`), and collate (`DiffusionCollator`). Whatever is wrong with the data is said here, before any training.
"""

# Shapes: B rows, L positions

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from datasets import Dataset, DatasetDict, Features, Sequence, Value, load_dataset, load_from_disk
from datasets.exceptions import DatasetsError
from jinja2 import TemplateError
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from a2d_core import embedded
from a2d_core.config import TrainConfig, UserError, require

IGNORED = -100
"""Label of a token that is never masked and never scored."""
EMBEDDED_ROWS = 50_000
"""Training conversations of `embedded:tasks`."""
BUILDERS = {".txt": "text", ".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}
"""File type -> builder of the datasets library. A .txt file is one document."""
ROLES = {"human": "user", "gpt": "assistant"}
"""Role names of ShareGPT data -> those of chat templates."""

Messages = list[dict[str, str]]

# --- loading --------------------------------------------------------------------------------------


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


# --- rows -----------------------------------------------------------------------------------------


def pretraining_rows(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, text_field: str, max_length: int, insert_eos: bool) -> Dataset:
    """All documents as one line of tokens, cut into rows: `input_ids` of exactly `max_length`, and the row's index `row`.

    With `insert_eos` each document ends with the end-of-sequence token. What is left at the very end, less than a row,
    is dropped. Raises `UserError` where the documents do not make one row.
    """
    rest: list[int] = []  # tokens of a row that the next batch completes

    def cut(batch: dict[str, list[Any]]) -> dict[str, list[list[int]]]:
        for ids in tokenizer([text or "" for text in batch[text_field]], verbose=False)["input_ids"]:
            closed = not insert_eos or ids[-1:] == [tokenizer.eos_token_id]
            rest.extend(ids if closed else [*ids, tokenizer.eos_token_id])
        end = len(rest) - len(rest) % max_length
        rows = [rest[start : start + max_length] for start in range(0, end, max_length)]
        del rest[:end]
        return {"input_ids": rows}

    features = Features({"input_ids": Sequence(Value("int32"))})
    rows = dataset.map(cut, batched=True, remove_columns=dataset.column_names, features=features, desc="cutting text into rows")
    require(
        len(rows) > 0,
        f"{len(dataset)} documents with {sum(len(text or '') for text in dataset[text_field])} characters do not make one row of "
        f"max_length={max_length} tokens: lower max_length, or give more text (a larger eval_fraction where the held-out part is short)",
    )
    return _numbered(rows)


def conversation_rows(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int, block_size: int | None = None
) -> tuple[Dataset, dict[str, int]]:
    """One row per assistant turn: `input_ids`, `labels` (-100 on all that precedes the turn), and the row's index `row`.

    The turn ends with its end-of-turn token; where the chat template writes none, the end-of-sequence token is put there.
    A row that is longer than `max_length`, once filled to a multiple of `block_size`, is dropped, as is one that
    cannot be supervised exactly. Returns the rows and how many were dropped for which reason. Raises `UserError`
    where the tokenizer has no chat template, or every row is dropped.
    """
    require(
        bool(tokenizer.chat_template),
        f"the tokenizer of '{tokenizer.name_or_path}' has no chat template: start from a model that has one, "
        "or put a chat_template.jinja into its directory",
    )
    closing = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}

    def tokenise(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        turns = [turn for messages in batch["messages"] for turn in _rendered_turns(messages, tokenizer)]
        prompts, wholes = ([turn[part] for turn in turns] for part in (0, 1))
        prompts, wholes = (tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] for texts in (prompts, wholes))
        rows: dict[str, list[Any]] = {"input_ids": [], "labels": [], "dropped": []}
        for prompt, whole, (_, _, reason) in zip(prompts, wholes, turns, strict=True):
            ids = prompt + _closed(whole[len(prompt) :], closing, tokenizer)
            if not reason and whole[: len(prompt)] != prompt:
                reason = "template does not extend its prompt"
            elif not reason and -(-len(ids) // (block_size or 1)) * (block_size or 1) > max_length:
                reason = f"longer than max_length={max_length}"
            rows["input_ids"].append([] if reason else ids)
            rows["labels"].append([] if reason else [IGNORED] * len(prompt) + ids[len(prompt) :])
            rows["dropped"].append(reason)
        return rows

    features = Features({"input_ids": Sequence(Value("int32")), "labels": Sequence(Value("int32")), "dropped": Value("string")})
    rows = dataset.map(tokenise, batched=True, remove_columns=dataset.column_names, features=features, desc="tokenising conversations")
    reasons = rows["dropped"][:]
    dropped = dict(Counter(filter(None, reasons)))
    require(sum(dropped.values()) < len(rows), f"no conversation is left; dropped were {dropped}: mend the data, or raise max_length")
    if dropped:
        rows = rows.select([index for index, reason in enumerate(reasons) if not reason])
    return _numbered(rows.remove_columns("dropped")), dropped


def _rendered_turns(messages: Messages, tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[str, str, str]]:
    """(prompt, prompt and answer, "") of each assistant turn, or ("", "", the reason why it is dropped)."""
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers:
        yield "", "", "no assistant turn"
    for index in answers:
        if index == 0:
            yield "", "", "no prompt"
        elif not messages[index]["content"].strip():
            yield "", "", "empty response"
        else:
            try:
                prompt = tokenizer.apply_chat_template(messages[:index], tokenize=False, add_generation_prompt=True)
                yield prompt, tokenizer.apply_chat_template(messages[: index + 1], tokenize=False), ""
            except TemplateError as error:
                yield "", "", f"refused by the chat template: {error}"


def _closed(answer: list[int], closing: set[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The answer's tokens up to its end-of-turn token, without the white space that a template puts behind it."""
    last = max((index for index, token in enumerate(answer) if token in closing), default=None)
    if last is not None and not tokenizer.decode(answer[last + 1 :]).strip():
        return answer[: last + 1]
    return [*answer, tokenizer.eos_token_id]


def _numbered(rows: Dataset) -> Dataset:
    return rows.add_column("row", list(range(len(rows))))


# --- batches --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DiffusionCollator:
    """Rows of different lengths -> one batch: {input_ids, labels: int64 [B, L]; valid: bool [B, L]; row: int64 [B], if rows have one}.

    Behind its own tokens a row is first *filled*, with a token that is attended and maskable (so that a model learns
    where answers end), then *padded*, neither attended nor scored. A row without labels is all maskable.
    """

    pad_token_id: int
    """Token of the padding."""
    fill_token_id: int
    """Token of the fill: the end-of-sequence token."""
    fill_to: Literal["block", "batch"] | None = None
    """How far a row is filled: to a multiple of `block_size`, to the longest row of the batch, or not at all."""
    block_size: int | None = None
    """Tokens per block, for `fill_to="block"`."""
    canvas: int | None = None
    """With `fill_to="batch"`: fill to at least this many tokens."""
    label_first: bool = True
    """Whether the first token of a row may be masked and scored; when false it is given."""

    def __post_init__(self) -> None:
        require(self.fill_to != "block" or (self.block_size or 0) >= 1, f"fill_to='block' needs a block_size, not {self.block_size}")
        require(self.canvas is None or self.fill_to == "batch", f"canvas={self.canvas} needs fill_to='batch', not {self.fill_to!r}")

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Collate rows of {input_ids, and optionally labels and row}."""
        lengths = [len(row["input_ids"]) for row in rows]
        ends = [self._filled_length(length, max(lengths)) for length in lengths]
        width = max(ends)
        batch: dict[str, list[Any]] = {"input_ids": [], "labels": [], "valid": []}
        for row, end in zip(rows, ends, strict=True):
            ids, labels = list(row["input_ids"]), list(row.get("labels", row["input_ids"]))
            fill, padding = [self.fill_token_id] * (end - len(ids)), width - end
            batch["input_ids"].append(ids + fill + [self.pad_token_id] * padding)
            batch["labels"].append(labels + fill + [IGNORED] * padding)
            batch["valid"].append([True] * end + [False] * padding)
        tensors = {name: torch.tensor(values) for name, values in batch.items()}
        if not self.label_first:
            tensors["labels"][:, 0] = IGNORED
        if "row" in rows[0]:
            tensors["row"] = torch.tensor([row["row"] for row in rows])
        return tensors

    def _filled_length(self, length: int, longest: int) -> int:
        if self.fill_to == "batch":
            return max(longest, self.canvas or 0)
        size = self.block_size if self.fill_to == "block" and self.block_size else 1
        return -(-length // size) * size
