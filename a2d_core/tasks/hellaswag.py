"""Documents of generative HellaSwag, for its task file."""

from __future__ import annotations

import re
from typing import Any

from datasets import Dataset


def cleaned(documents: Dataset) -> Dataset:
    """With `context`, and with the endings, free of WikiHow's markup."""

    def clean(row: dict[str, Any]) -> dict[str, Any]:
        context = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
        return {"context": _plain(context), "endings": [_plain(ending) for ending in row["endings"]]}

    return documents.map(clean)


def _plain(text: str) -> str:
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")
