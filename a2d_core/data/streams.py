"""Text that is read while training: for what is too large to download and tokenise first."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from itertools import count
from typing import Any

import numpy as np
import torch
from datasets import Dataset, IterableDataset, interleave_datasets
from transformers import PreTrainedTokenizerBase

from a2d_core.config import Source, TrainConfig, parse_sources, require
from a2d_core.data.readers import TEXT, text_column
from a2d_core.data.sources import configs_and_splits, keep, load_embedded, load_split
from a2d_core.data.text import PACKED, TOKENS, Cutter, numbered, tokenised

BATCH = 256
"""Documents that are tokenised at once."""


def stream_rows(config: TrainConfig, tokenizer: PreTrainedTokenizerBase, seed: int) -> tuple[RowStream, Dataset]:
    """(a stream of training rows, `max_eval_rows` held-out rows), both as `pretraining_rows` makes them.

    Held out are the first documents of `eval_split` (or of the test part of a known data set), and else of the training
    split itself; the stream skips every document with the text of one of them. Raises `UserError` as `load_documents`
    does, and where the held-out documents do not make one row.
    """
    documents, held_out = open_stream(config, seed)
    cutter, texts = Cutter(config.max_length, config.pack), set()
    rows: list[dict[str, list[int]]] = []
    for batch in held_out.iter(1):
        (ids,) = tokenised(batch["text"], tokenizer, config.insert_eos)
        if ids:
            texts.add(_digest(batch["text"][0]))
            rows.extend(_rows(cutter, [ids]))
        if len(rows) >= config.max_eval_rows:
            break
    require(bool(rows), f"the held-out text of '{config.dataset}' does not make one row of max_length={config.max_length}: lower it")
    eval_rows = Dataset.from_list(rows[: config.max_eval_rows], features=PACKED if config.pack else TOKENS)
    return RowStream(documents, tokenizer, config, texts), numbered(eval_rows)


class RowStream(torch.utils.data.IterableDataset[dict[str, Any]]):
    """Rows without end: pass after pass over the documents, each shuffled anew, as {input_ids, row} and, packed, `document`.

    Two iterations give the same rows, because the order depends on the seed and the number of the pass alone. So a
    resumed training, for which transformers reads and throws away what was trained on, sees exactly the rows that the
    uninterrupted one would have seen. That costs reading and tokenising that part again. With several processes
    each of them reads the whole stream and keeps its share of every batch.
    """

    def __init__(self, documents: IterableDataset, tokenizer: PreTrainedTokenizerBase, config: TrainConfig, held_out: set[bytes]) -> None:
        self.documents, self.tokenizer, self.config, self.held_out = documents, tokenizer, config, held_out
        self.dropped: dict[str, int] = {}
        """Reason -> documents dropped for it in all that was read since the newest iteration began."""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self.dropped.clear()
        cutter, number = Cutter(self.config.max_length, self.config.pack), 0
        for epoch in count():
            self.documents.set_epoch(epoch)
            before = number
            for batch in self.documents.iter(BATCH):
                texts = [text for text in batch["text"] if not text or _digest(text) not in self.held_out]
                if empty := sum(not text for text in texts):
                    self.dropped["empty"] = self.dropped.get("empty", 0) + empty
                for row in _rows(cutter, tokenised(texts, self.tokenizer, self.config.insert_eos)):
                    yield {**row, "row": number}
                    number += 1
            require(
                number > before,
                f"the stream of '{self.config.dataset}' does not make one row of max_length={self.config.max_length} beside its held-out "
                "documents: read it with streaming=false, or name an eval_split",
            )


def open_stream(config: TrainConfig, seed: int) -> tuple[IterableDataset, IterableDataset]:
    """(the training documents, shuffled; the documents of which the first are held out), each with the column `text`.

    Shuffled are the order of the files and, within `shuffle_buffer` documents, what they hold. Several sources stand among
    one another by chance, in proportion to their numbers of rows. `[train:N]` reads the first N rows of a source.
    """
    opened = [_open(source, config, seed) for source in parse_sources(config.dataset)]
    train, held_out = (_mixed([source[part] for source in opened], [size for *_, size in opened], config, seed) for part in (0, 1))
    return train.shuffle(seed=seed, buffer_size=config.shuffle_buffer), held_out


def _open(source: Source, config: TrainConfig, seed: int) -> tuple[IterableDataset, IterableDataset, int | None]:
    """One source's training documents, those of which the first are held out, and the number of the former where it is known."""
    if source.ref.startswith("embedded:"):
        loaded = load_embedded(source, config, seed)
        parts, size = [part.to_iterable_dataset() for part in loaded], loaded[0].num_rows
    else:
        names, splits = configs_and_splits(source, config)
        parts = [load_split(source.ref, names[0], split, streaming=True) for split in splits]
        size = getattr((parts[0].info.splits or {}).get(splits[0]), "num_examples", None)
    texts = [_texts(part, source, config) for part in parts]
    train = texts[0] if source.train is None else texts[0].take(source.train)
    held_out = texts[-1] if source.test is None else texts[-1].take(source.test)
    return train, held_out, source.train or (None if source.filters else size)


def _texts(documents: IterableDataset, source: Source, config: TrainConfig) -> IterableDataset:
    """The documents that pass the source's filters, in the one column `text`."""
    columns = documents.column_names or list(next(iter(documents), {}))
    require(bool(columns), f"data set '{source.ref}' has no rows")
    column = text_column(columns, source.ref, config)
    if source.filters:
        looked_at, passes = keep(source, columns)
        documents = documents.filter(passes, input_columns=looked_at, batched=True)
    return documents.map(lambda row: {"text": row[column]}, remove_columns=columns, features=TEXT)


def _mixed(streams: list[IterableDataset], sizes: list[int | None], config: TrainConfig, seed: int) -> IterableDataset:
    if len(streams) == 1:
        return streams[0]
    for source, size in zip(parse_sources(config.dataset), sizes, strict=True):
        require(
            bool(size), f"how many rows '{source.ref}' has is not known before it is read: say how many to stream, as {source.ref}[train:N]"
        )
    shares = [size / sum(filter(None, sizes)) for size in sizes if size]
    return interleave_datasets(streams, probabilities=shares, seed=seed, stopping_strategy="all_exhausted_without_replacement")


def _rows(cutter: Cutter, documents: list[list[int]]) -> Iterator[dict[str, list[int]]]:
    """The rows that these documents fill."""
    tokens_T = np.fromiter((token for ids in documents for token in ids), np.int32)
    columns = cutter.cut(tokens_T, np.array([len(ids) for ids in documents], np.int64))
    for values in zip(*(column.to_pylist() for column in columns.values()), strict=True):
        yield dict(zip(columns, values, strict=True))


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()
