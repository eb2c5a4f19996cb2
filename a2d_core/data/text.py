"""From documents to rows of tokens for pretraining."""

from __future__ import annotations

from typing import Any

from datasets import Dataset, Features, Sequence, Value
from transformers import PreTrainedTokenizerBase

from a2d_core.config import require


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
    return numbered(rows)


def numbered(rows: Dataset) -> Dataset:
    """The rows with their index in a column `row`, from which a row draws its evaluation noise."""
    return rows.add_column("row", list(range(len(rows))))
