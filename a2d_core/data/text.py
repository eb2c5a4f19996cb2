"""From documents to rows of tokens for pretraining."""

# Shapes: R rows, L positions, T tokens of a batch of documents

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features, Sequence, Value
from transformers import PreTrainedTokenizerBase

from a2d_core.config import require
from a2d_core.data.cache import fingerprint, processes, tokenizer_key

TOKENS = Features({"input_ids": Sequence(Value("int32"))})
PACKED = Features({**TOKENS, "document": Sequence(Value("int32"))})


def pretraining_rows(
    documents: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int, insert_eos: bool, *, pack: bool = False, num_workers: int = 1
) -> tuple[Dataset, dict[str, int]]:
    """All documents as one line of tokens, cut into rows: `input_ids` of exactly `max_length`, and the row's index `row`.

    With `insert_eos` each document ends with the end-of-sequence token. With `pack` a row also has `document`: for each token
    the index, from 0, of its document within the row; what a row's end cuts off is another document in the next. What is
    left at the very end, less than a row, is dropped. Returns the rows and how many documents were dropped for which
    reason. Raises `UserError` where the documents do not make one row.

    `num_workers` processes tokenise, and the datasets library keeps what they made of data from the disk: a later run
    with the same documents and tokenizer reads it, whatever its `max_length`.
    """
    tokens = documents.map(
        lambda batch: {"input_ids": tokenised(batch["text"], tokenizer, insert_eos)},
        batched=True,
        num_proc=processes(num_workers),
        remove_columns=documents.column_names,
        features=TOKENS,
        new_fingerprint=fingerprint(documents, "tokenise", tokenizer_key(tokenizer), insert_eos),
        desc="tokenising text",
    )
    lengths = pc.list_value_length(tokens.data.column("input_ids"))
    total, empty = pc.sum(lengths).as_py() or 0, pc.sum(pc.equal(lengths, 0)).as_py() or 0
    require(
        total >= max_length,
        f"{len(documents)} documents with {total} tokens do not make one row of max_length={max_length} tokens: "
        "lower max_length, or give more text (a larger eval_fraction where the held-out part is short)",
    )
    cutter = Cutter(max_length, pack)

    def cut(batch: pa.Table) -> pa.Table:
        column = batch["input_ids"].combine_chunks()
        return pa.table(cutter.cut(column.flatten().to_numpy(), pc.list_value_length(column).to_numpy()))

    features = PACKED if pack else TOKENS
    rows = tokens.with_format("arrow").map(
        cut,
        batched=True,
        features=features,
        remove_columns=tokens.column_names,
        new_fingerprint=fingerprint(tokens, "cut", max_length, pack),
        desc="cutting text into rows",
    )
    return numbered(rows.with_format(None)), {"empty": empty} if empty else {}


def tokenised(texts: list[str | None], tokenizer: PreTrainedTokenizerBase, insert_eos: bool) -> list[list[int]]:
    """The tokens of each document; none of one that is empty."""
    ids = tokenizer([text or "" for text in texts], verbose=False)["input_ids"] if texts else []
    end = [tokenizer.eos_token_id] if insert_eos else []
    return [(one if one[-1:] == end else one + end) if text else [] for one, text in zip(ids, texts, strict=True)]


class Cutter:
    """Cuts documents that come batch by batch into rows, and keeps what does not fill a row for the next batch."""

    def __init__(self, max_length: int, pack: bool) -> None:
        self.max_length, self.pack = max_length, pack
        self.tokens_T, self.is_start_T = np.empty(0, np.int32), np.empty(0, bool)

    def cut(self, tokens_T: np.ndarray[Any, Any], lengths: np.ndarray[Any, Any]) -> dict[str, pa.ListArray]:
        """The rows that are full, as columns: the tokens of documents of these lengths, behind those that were kept."""
        is_start_T = np.zeros(len(tokens_T), bool)
        is_start_T[(np.cumsum(lengths) - lengths)[lengths > 0]] = True
        tokens_T, is_start_T = np.concatenate([self.tokens_T, tokens_T]), np.concatenate([self.is_start_T, is_start_T])
        end = len(tokens_T) - len(tokens_T) % self.max_length
        self.tokens_T, self.is_start_T = tokens_T[end:], is_start_T[end:]
        columns = {"input_ids": self._lists(tokens_T[:end])}
        if self.pack:
            document_RL = np.cumsum(is_start_T[:end].reshape(-1, self.max_length), axis=1)
            columns["document"] = self._lists(document_RL - document_RL[:, :1])
        return columns

    def _lists(self, values: np.ndarray[Any, Any]) -> pa.ListArray:
        offsets = np.arange(0, values.size + 1, self.max_length, dtype=np.int32)
        return pa.ListArray.from_arrays(offsets, pa.array(values.reshape(-1).astype(np.int32)))


def numbered(rows: Dataset) -> Dataset:
    """The rows with their index in a column `row`, from which a row draws its evaluation noise."""
    return rows.add_column("row", np.arange(len(rows)))
