"""Where text and conversations come from: the Hub, files, and the embedded default, each as a training and a held-out part.

`parse_sources` in `a2d_core.config` has the grammar of `dataset`, and `readers` knows what stands where in a row.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from datasets import (
    Dataset,
    DatasetDict,
    concatenate_datasets,
    get_dataset_config_names,
    get_dataset_split_names,
    load_dataset,
    load_from_disk,
)
from datasets.exceptions import DatasetsError

from a2d_core import embedded
from a2d_core.config import Source, TrainConfig, UserError, parse_sources, require
from a2d_core.data.cache import fingerprint, processes
from a2d_core.data.readers import BUILDERS, Reader, known, read_conversations, read_documents, require_columns

EMBEDDED_ROWS = 50_000
"""Training conversations of `embedded:tasks`."""

Read = Callable[[Dataset, str, TrainConfig], Dataset]


def load_documents(spec: str, config: TrainConfig, seed: int = 0) -> tuple[Dataset, Dataset]:
    """The (training, held-out) texts of data sets, each with the one column `text`.

    `spec` names a Hub id, a file (.txt, .jsonl, .json, .parquet, .csv), a directory of such files, one made by `save_to_disk`,
    or `embedded:corpus`; or several of them, whose rows then stand evenly among one another, in proportion to their
    numbers. `[column:value]` keeps the rows with that value. Held out is `config.eval_split`, the test part of a known
    data set, or `eval_fraction` of the rows, drawn by `seed`; of a single document its end; `embedded:corpus` has its
    own. `[train:N,test:N]` then draws so many rows of each part by `seed`. Raises `UserError` for a missing file, data
    set, split, column or value, and for conversations.
    """
    return _load(spec, config, seed, read_documents)


def load_conversations(spec: str, config: TrainConfig, seed: int = 0) -> tuple[Dataset, Dataset]:
    """The (training, held-out) conversations of data sets, each with the one column `messages` of {role, content}.

    `spec` and the held-out part are as in `load_documents`; `embedded:tasks` holds out its test words. The first of these
    is read: `prompt_field` with `response_field`; `messages_field`; what the name of a known data set says; `messages` or
    `conversations`, with keys role/content or from/value (human, gpt); the Alpaca columns instruction, input (may be
    missing or empty) and output. Raises `UserError` as `load_documents` does, for text, and for `config.streaming`.
    """
    require(not config.streaming, f"streaming=true reads text alone, for pretrain, and '{spec}' is read for sft: leave it out")
    return _load(spec, config, seed, read_conversations)


def _load(spec: str, config: TrainConfig, seed: int, read: Read) -> tuple[Dataset, Dataset]:
    parts = [_load_source(source, config, seed, read) for source in parse_sources(spec)]
    return _interleaved([train for train, _ in parts]), _interleaved([held_out for _, held_out in parts])


def _load_source(source: Source, config: TrainConfig, seed: int, read: Read) -> tuple[Dataset, Dataset]:
    """The two parts of one data set: filtered, read, held out, and sampled, in this order."""
    if source.ref.startswith("embedded:"):
        parts = tuple(read(_filtered([part], source, config)[0], source.ref, config) for part in load_embedded(source, config, seed))
    else:
        names, splits = configs_and_splits(source, config)
        loaded = ([load_split(source.ref, name, split) for name in names] for split in splits)
        kept = (_filtered(pieces, source, config) for pieces in loaded)
        parts = tuple(_interleaved([read(piece, source.ref, config) for piece in pieces]) for pieces in kept)
    train, held_out = _held_out(parts, source.ref, config, seed)
    return _sampled(train, source, "train", source.train, seed), _sampled(held_out, source, "test", source.test, seed)


# --- one data set ---------------------------------------------------------------------------------


def load_embedded(source: Source, config: TrainConfig, seed: int) -> tuple[Dataset, Dataset]:
    """The two parts of `embedded:corpus` or `embedded:tasks`; raises `UserError` for another name."""
    if source.ref == "embedded:corpus":
        train, held_out = embedded.corpus_split()
        return Dataset.from_dict({"text": list(train)}), Dataset.from_dict({"text": list(held_out)})
    require(
        source.ref == "embedded:tasks", f"unknown data set '{source.ref}': choose embedded:corpus (text) or embedded:tasks (conversations)"
    )
    wanted = config.max_steps * config.batch_size * config.gradient_accumulation_steps
    rows = source.train or (min(wanted, EMBEDDED_ROWS) if wanted > 0 else EMBEDDED_ROWS)
    return Dataset.from_list(embedded.instructions("train", rows, seed)), Dataset.from_list(embedded.instructions("test"))


def configs_and_splits(source: Source, config: TrainConfig) -> tuple[tuple[str | None, ...], tuple[str, ...]]:
    """The configurations (subsets) to read, and the split to train on with, where there is one, the split that is held out.

    Of a known data set they are its own, unless the user names others, or a local copy lacks them.
    """
    reader, path = known(source.ref) or Reader(), Path(source.ref).expanduser()
    named = source.config or config.dataset_config
    configs: tuple[str | None, ...] = (named,) if named else reader.configs or (None,)
    if path.exists() and not named and reader.configs and not (path.is_dir() and set(configs) <= set(get_dataset_config_names(str(path)))):
        configs = (None,)
    eval_split = config.eval_split or reader.eval_split
    if path.exists() and not config.eval_split and eval_split and eval_split not in _local_splits(path, configs[0]):
        eval_split = None
    return configs, tuple(filter(None, (source.split or config.train_split, eval_split)))


def load_split(ref: str, name: str | None, split: str, streaming: bool = False) -> Any:
    """One split of a Hub data set, a directory or a file: a `Dataset`, or an `IterableDataset` where `streaming`.

    Raises `UserError` where there is no such data set or split, or it cannot be read.
    """
    path = Path(ref).expanduser()
    if _is_saved(path):
        dataset = load_from_disk(path)
        splits = dataset if isinstance(dataset, DatasetDict) else DatasetDict({split: dataset})
        require(split in splits, f"data set '{ref}' has no split '{split}': its splits are {', '.join(splits)}")
        return splits[split].to_iterable_dataset() if streaming else splits[split]
    source = _source(ref, path)
    try:
        dataset = load_dataset(**source, name=name, split=split, streaming=streaming)
        if path.exists() and not streaming:
            dataset.data.validate(full=True)  # JSON is read without a look at its encoding
        return dataset
    except (OSError, ValueError, DatasetsError) as error:
        cause = error.__cause__ or error
        if path.exists():
            remedy = ": convert the file to UTF-8" if isinstance(cause, UnicodeError) else ""
        else:
            remedy = (
                ". Check the name; for a gated or private data set set HF_TOKEN to a token of an account that may read it; "
                "without a network set HF_HUB_OFFLINE=1 and give a local file or directory"
            )
        raise UserError(f"cannot load split '{split}' of data set '{ref}': {cause}{remedy}") from error


def _is_saved(path: Path) -> bool:
    return (path / "state.json").exists() or (path / "dataset_dict.json").exists()


def _local_splits(path: Path, name: str | None) -> Iterable[str]:
    if _is_saved(path):
        return load_from_disk(path) if (path / "dataset_dict.json").exists() else ()
    return get_dataset_split_names(str(path), name) if path.is_dir() else ()


def _source(ref: str, path: Path) -> dict[str, Any]:
    """What `load_dataset` needs to know of a file, a directory, or a Hub id."""
    if path.is_file():
        require(path.suffix in BUILDERS, f"data file '{ref}' is of no known type: use one of {', '.join(BUILDERS)}")
        require(path.stat().st_size > 0, f"data file '{ref}' is empty")
        options = {"sample_by": "document"} if path.suffix == ".txt" else {}
        return {"path": BUILDERS[path.suffix], "data_files": {"train": [str(path)]}, **options}
    if path.is_dir():
        suffixes = {file.suffix for file in path.rglob("*") if file.suffix in BUILDERS}
        require(bool(suffixes), f"directory '{ref}' holds no data files: it needs some of {', '.join(BUILDERS)}")
        return {"path": str(path), **({"sample_by": "document"} if suffixes == {".txt"} else {})}
    looks_local = path.suffix in BUILDERS or ref.startswith(("/", ".", "~")) or ref.count("/") > 1
    require(not looks_local, f"data set '{ref}' does not exist: give an existing file or directory, or a Hub id such as owner/name")
    return {"path": ref}


# --- which of its rows ----------------------------------------------------------------------------


def keep(source: Source, columns: Iterable[str]) -> tuple[list[str], Callable[..., list[bool]]]:
    """The columns that the filters of a source look at, and which rows of a batch of these columns pass all of them."""
    columns, contains = list(columns), (known(source.ref) or Reader()).contains
    tests = []
    for key, value in source.filters:
        column = key if key in columns else contains.get(key, key)
        require_columns(columns, source.ref, **{f"[{key}:{value}]": column})
        tests.append((column, value, column != key))

    def passes(*batch: list[Any]) -> list[bool]:
        def has(cell: Any, wanted: str, is_part: bool) -> bool:
            return wanted in as_text(cell) if is_part else wanted == as_text(cell)

        return [all(has(cell, *test[1:]) for cell, test in zip(row, tests, strict=True)) for row in zip(*batch, strict=True)]

    return [column for column, _, _ in tests], passes


def as_text(value: Any) -> str:
    """How the value of a column is written in a filter: `true` and `false`, and else as Python writes it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _filtered(pieces: list[Dataset], source: Source, config: TrainConfig) -> list[Dataset]:
    """The rows that pass the filters, of those pieces of a data set that have some."""
    if not source.filters:
        return pieces
    kept = []
    for piece in pieces:
        columns, passes = keep(source, piece.column_names)
        name, workers = fingerprint(piece, "filter", source.filters, columns), processes(config.num_workers)
        desc = f"filtering {source.ref}"
        kept.append(piece.filter(passes, input_columns=columns, batched=True, num_proc=workers, new_fingerprint=name, desc=desc))
    if not any(map(len, kept)):
        common = "; ".join(f"the commonest in '{column}' are {_commonest(pieces, column)}" for column in columns)
        raise UserError(f"no row of data set '{source.ref}' passes [{','.join(map(':'.join, source.filters))}]: {common}")
    return [piece for piece in kept if len(piece)]


def _commonest(pieces: list[Dataset], column: str) -> str:
    counts: Counter[str] = Counter()
    for piece in pieces:
        for batch in piece.select_columns([column]).iter(1000):
            counts.update(as_text(value)[:80] for value in batch[column])
    return ", ".join(f"'{value}' ({count} rows)" for value, count in counts.most_common(5))


def _held_out(parts: tuple[Dataset, ...], ref: str, config: TrainConfig, seed: int) -> tuple[Dataset, Dataset]:
    """The two parts; where there is one, `eval_fraction` of its rows, at least one on both sides, are held out, in their order."""
    if len(parts) == 2:
        return parts[0], parts[1]
    (dataset,), rows = parts, len(parts[0])
    if rows == 1 and dataset.column_names == ["text"]:
        text = dataset[0]["text"] or ""
        end = len(text) - max(1, round(config.eval_fraction * len(text)))
        return Dataset.from_dict({"text": [text[:end]]}), Dataset.from_dict({"text": [text[end:]]})
    require(rows >= 2, f"data set '{ref}' has {rows} rows to train on, none to hold out: add rows, or name an eval_split")
    count = min(max(1, round(config.eval_fraction * rows)), rows - 1)
    is_held_out = np.zeros(rows, dtype=bool)
    is_held_out[np.random.default_rng(seed).choice(rows, count, replace=False)] = True
    return _selected(dataset, ~is_held_out, "train", count, seed), _selected(dataset, is_held_out, "held out", count, seed)


def _sampled(part: Dataset, source: Source, name: str, rows: int | None, seed: int) -> Dataset:
    """So many rows of a part, drawn by the seed, in their order."""
    if rows is None or rows == len(part):
        return part
    remedy = "raise eval_fraction, or ask for fewer" if name == "test" else "ask for fewer"
    require(rows < len(part), f"'{source.ref}[{name}:{rows}]' asks for {rows} rows, and that part has {len(part)}: {remedy}")
    is_drawn = np.zeros(len(part), dtype=bool)
    is_drawn[np.random.default_rng([seed, 1]).choice(len(part), rows, replace=False)] = True
    return _selected(part, is_drawn, "sample", rows, seed)


def _selected(dataset: Dataset, is_selected: np.ndarray[Any, Any], step: str, count: int, seed: int) -> Dataset:
    return dataset.select(np.flatnonzero(is_selected), new_fingerprint=fingerprint(dataset, step, count, seed))


def _interleaved(parts: list[Dataset]) -> Dataset:
    """The rows of all parts, those of each spread evenly over the whole: row j of n stands at (j + 1/2) / n of the way."""
    if len(parts) == 1:
        return parts[0]
    place = np.concatenate([(np.arange(len(part)) + 0.5) / len(part) for part in parts])
    name = fingerprint(parts[0], "interleave", [part._fingerprint for part in parts[1:]])
    return concatenate_datasets(parts).select(np.argsort(place, kind="stable"), new_fingerprint=name)
