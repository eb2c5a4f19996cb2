"""Documents of the embedded word tasks, for their task files."""

from __future__ import annotations

from typing import Any

from datasets import Dataset

from a2d_core import embedded

EXAMPLES = 100
"""Training documents of a task that few-shot examples are drawn from."""


def documents(operation: str, **_: Any) -> dict[str, Dataset]:
    """The splits `train` and `test` of one task, rows of {prompt, answer, word}; test: every held-out word.

    lm-eval also passes the task file's metadata, which says nothing about the documents.
    """
    train = embedded.instructions("train", EXAMPLES * len(embedded.TASKS))
    return {name: _dataset(operation, rows) for name, rows in (("train", train), ("test", embedded.instructions("test")))}


def _dataset(operation: str, conversations: list[dict[str, Any]]) -> Dataset:
    rows = [c for c in conversations if c["task"] == operation]
    prompts, answers = ([c["messages"][turn]["content"] for c in rows] for turn in (0, 1))
    return Dataset.from_dict({"prompt": prompts, "answer": answers, "word": [c["word"] for c in rows]})
