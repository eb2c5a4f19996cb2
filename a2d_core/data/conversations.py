"""From conversations to rows of tokens for supervised fine-tuning (SFT): what is given, and what is supervised."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from datasets import Dataset, Features, Sequence, Value
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from a2d_core.config import require
from a2d_core.data.sources import Messages
from a2d_core.data.text import numbered


def conversation_rows(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int, block_size: int | None = None
) -> tuple[Dataset, dict[str, int]]:
    """One row per assistant turn: `input_ids`, `turn` (1 on the turn, 0 before it), and the row's index `row`.

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
        rows: dict[str, list[Any]] = {"input_ids": [], "turn": [], "dropped": []}
        for prompt, whole, (_, _, reason) in zip(prompts, wholes, turns, strict=True):
            ids = prompt + _closed(whole[len(prompt) :], closing, tokenizer)
            if not reason and whole[: len(prompt)] != prompt:
                reason = "template does not extend its prompt"
            elif not reason and -(-len(ids) // (block_size or 1)) * (block_size or 1) > max_length:
                reason = f"longer than max_length={max_length}"
            rows["input_ids"].append([] if reason else ids)
            rows["turn"].append([] if reason else [0] * len(prompt) + [1] * (len(ids) - len(prompt)))
            rows["dropped"].append(reason)
        return rows

    features = Features({"input_ids": Sequence(Value("int32")), "turn": Sequence(Value("int32")), "dropped": Value("string")})
    rows = dataset.map(tokenise, batched=True, remove_columns=dataset.column_names, features=features, desc="tokenising conversations")
    reasons = rows["dropped"][:]
    dropped = dict(Counter(filter(None, reasons)))
    require(sum(dropped.values()) < len(rows), f"no conversation is left; dropped were {dropped}: mend the data, or raise max_length")
    if dropped:
        rows = rows.select([index for index, reason in enumerate(reasons) if not reason])
    return numbered(rows.remove_columns("dropped")), dropped


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
