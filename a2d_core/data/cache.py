"""Names under which the datasets library keeps what was made of a data set, so that a later run finds it."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import numpy as np
from datasets import Dataset
from datasets.fingerprint import Hasher
from transformers import PreTrainedTokenizerBase

FORMAT = 1
"""Raised when a step of this package makes something else of the same input: what is in the cache is then made anew."""


DIGEST_ROWS = 1024
"""Rows that `digest` reads."""


def fingerprint(dataset: Dataset, step: str, *settings: Any) -> str:
    """The name of what `step` makes of a data set with these (JSON-serialisable) settings, the same in every process.

    The library's own names hash the step's function, in which a tokenizer is another object once it was used.
    """
    return Hasher.hash(json.dumps([FORMAT, dataset._fingerprint, step, *settings]))


def digest(rows: Dataset) -> str:
    """A SHA-256 that stands for the content of rows: of their number, and of `DIGEST_ROWS` of them, spread evenly.

    Where there are more, a change in the others goes unnoticed; other data, another tokenizer, length, filter or order does not.
    """
    index = np.linspace(0, len(rows) - 1, min(len(rows), DIGEST_ROWS)).round().astype(int)
    return hashlib.sha256(json.dumps([len(rows), rows.select(index).to_list()]).encode()).hexdigest()


def processes(num_workers: int) -> int | None:
    """`num_proc` of the datasets library, to which 1 is a process beside this one."""
    return num_workers if num_workers > 1 else None


def tokenizer_key(tokenizer: PreTrainedTokenizerBase) -> str:
    """A name for what a tokenizer does to text: its vocabulary and rules, but not the padding that its last use has set."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return Hasher.hash(tokenizer)
    rules = json.loads(backend.to_str()) | {"padding": None, "truncation": None}
    return Hasher.hash(json.dumps([rules, tokenizer.eos_token_id, getattr(tokenizer, "split_special_tokens", False)]))
