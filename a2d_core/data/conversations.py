"""From conversations to rows of tokens for supervised fine-tuning (SFT): what is given, and what is supervised.

A row holds exactly what sampling will see: the prompt of a supervised turn is the chat template's rendering of all that
precedes the turn, with the generation prompt, and its answer is what the template puts behind that for the whole turn.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow.compute as pc
from datasets import Dataset, Features, Sequence, Value
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from a2d_core.config import UserError, require
from a2d_core.data.cache import fingerprint, processes, tokenizer_key
from a2d_core.data.text import numbered

QUESTION, ANSWER = "@@question@@", "@@answer@@"
"""Contents that show what a chat template puts around them."""
COLUMNS = {"input_ids": Sequence(Value("int32")), "turn": Sequence(Value("int16"))}


def conversation_rows(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    block_size: int | None = None,
    *,
    supervise: Literal["all", "last"] = "all",
    too_long: Literal["drop", "truncate"] = "drop",
    pack: bool = False,
    num_workers: int = 1,
) -> tuple[Dataset, dict[str, Any]]:
    """Rows of `input_ids`, `turn` and the row's index `row`; and the facts: how many turns were `dropped` for which reason.

    `turn` has a number for each token: 0 is given and never scored, k >= 1 belongs to the k-th supervised turn of the row, its
    end-of-turn token included. A turn ends with the template's own end-of-turn token, or else with the end-of-sequence token.
    With `block_size` a row holds a conversation up to its last supervised turn, without it one supervised turn and what precedes
    it. Where a template renders an earlier turn otherwise once later ones follow (Qwen3 leaves out its thoughts), the
    conversation goes on in a further row. A turn that cannot be supervised exactly stays context of the later ones.

    A row, once filled to a multiple of `block_size`, has at most `max_length` tokens: turns that end behind them are dropped, or
    cut there (`too_long="truncate"`; a cut turn has no end). `supervise="last"` learns a conversation's last assistant turn only.
    With `pack` rows are filled and put together (see `_pack`), and the facts tell the share of `padding` that is left.
    `num_workers` processes do the work, and the datasets library keeps what they made of data from the disk.
    Raises `UserError` where the tokenizer has no usable chat template, nothing is left, or rows cannot be packed.
    """
    require(
        not pack or block_size is not None,
        "pack=true does not fit mdlm, which fills each answer to the longest row and leaves nothing to pack: set pack=false",
    )
    limit = max_length - max_length % (block_size or 1)
    reader = _Reader(tokenizer, *_ending(tokenizer), limit, block_size is not None, supervise, too_long)
    workers = processes(num_workers)
    rows = dataset.map(
        reader,
        batched=True,
        num_proc=workers,
        remove_columns=dataset.column_names,
        features=Features({**COLUMNS, "dropped": Value("string")}),
        new_fingerprint=fingerprint(dataset, "tokenise conversations", *reader.key()),
        desc="tokenising conversations",
    )
    reasons = rows.data.column("dropped")
    dropped = {count["values"]: count["counts"] for count in pc.value_counts(reasons).to_pylist() if count["values"]}
    require(sum(dropped.values()) < len(rows), f"no conversation is left; dropped were {dropped}: mend the data, or raise max_length")
    if dropped:
        rows = rows.select(pc.indices_nonzero(pc.equal(reasons, "")))
    rows, facts = rows.remove_columns("dropped"), {"dropped": dropped}
    if pack:
        features = Features({**COLUMNS, "document": Sequence(Value("int16"))})
        packing = {"limit": limit, "block_size": block_size, "fill": tokenizer.eos_token_id}
        rows = rows.map(_pack, batched=True, num_proc=workers, fn_kwargs=packing, features=features, desc="packing conversations")
        tokens = pc.sum(pc.list_value_length(rows.data.column("input_ids"))).as_py()
        facts["padding"] = 1 - tokens / (len(rows) * limit)
    return numbered(rows), facts


@dataclass(frozen=True)
class _Turn:
    """An assistant's turn as text."""

    conversation: int
    """Index of its conversation in the batch."""
    prompt: str = ""
    whole: str = ""
    """The prompt and the answer, up to and with the end-of-turn token."""
    dropped: str = ""
    """Why it is not supervised."""


@dataclass(frozen=True)
class _Reader:
    """Makes rows of a batch of conversations; the refused turns are empty rows with the reason in `dropped`."""

    tokenizer: PreTrainedTokenizerBase
    ending: str
    """What the chat template puts behind an assistant's answer."""
    closing: str
    """The beginning of it that belongs to the answer: up to the end-of-turn token, or nothing where there is none."""
    limit: int
    """Tokens of a row, at most."""
    joins: bool
    """Whether the turns of a conversation share a row."""
    supervise: str
    too_long: str

    def key(self) -> list[Any]:
        """What the rows depend on, besides the conversations."""
        rules = tokenizer_key(self.tokenizer), self.tokenizer.special_tokens_map, self.tokenizer.chat_template
        return [*rules, self.limit, self.joins, self.supervise, self.too_long]

    def __call__(self, batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        turns = [turn for number, messages in enumerate(batch["messages"]) for turn in self._turns(number, messages)]
        prompts, wholes = self._encode([turn.prompt for turn in turns]), self._encode([turn.whole for turn in turns])
        rows: dict[str, list[Any]] = {"input_ids": [], "turn": [], "dropped": []}
        conversation, ids, numbers = -1, list[int](), list[int]()  # of the row that the next turn may extend
        for turn, prompt, whole in zip(turns, prompts, wholes, strict=True):
            whole, reason = self._exact(turn, prompt, whole)
            if reason:
                _append(rows, [], [], reason)
                continue
            if not self.joins or turn.conversation != conversation or prompt[: len(ids)] != ids:
                conversation, ids, numbers = turn.conversation, [], []
                _append(rows, ids, numbers, "")
            answer = [numbers[-1] + 1 if numbers else 1] * (len(whole) - len(prompt))
            numbers += [0] * (len(prompt) - len(ids)) + answer
            ids += whole[len(ids) :]
        return rows

    def _turns(self, number: int, messages: list[dict[str, str]]) -> Iterator[_Turn]:
        answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        if not answers:
            yield _Turn(number, dropped="no assistant turn")
        for index in answers if self.supervise == "all" else answers[-1:]:
            if index == 0:
                yield _Turn(number, dropped="no prompt")
            elif not messages[index]["content"].strip():
                yield _Turn(number, dropped="empty response")
            else:
                yield self._rendered(number, messages[: index + 1])

    def _rendered(self, number: int, messages: list[dict[str, str]]) -> _Turn:
        try:
            prompt = self.tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
            text = self.tokenizer.apply_chat_template(messages, tokenize=False)
        except TemplateError as error:
            return _Turn(number, dropped=f"refused by the chat template: {error}")
        if not text.startswith(prompt):
            return _Turn(number, dropped="template does not extend its prompt")
        if not text.endswith(self.ending):
            return _Turn(number, dropped="template ends this turn in another way")
        text = text[: len(text) - len(self.ending)]
        if not text[len(prompt) :].strip():
            return _Turn(number, dropped="empty response")
        return _Turn(number, prompt, text + self.closing)

    def _exact(self, turn: _Turn, prompt: list[int], whole: list[int]) -> tuple[list[int], str]:
        """The tokens of prompt and answer, beginning with those of the prompt alone, which sampling sees; or the reason against it."""
        if turn.dropped:
            return [], turn.dropped
        if whole[: len(prompt)] != prompt:  # a token of the whole text crosses the boundary; sampling goes on from the prompt's tokens
            whole = prompt + self._encode([turn.whole[len(turn.prompt) :]])[0]
            if self.tokenizer.decode(whole, clean_up_tokenization_spaces=False) != turn.whole:
                return [], "tokens of prompt and response cannot be told apart"
        whole = whole if self.closing else [*whole, self.tokenizer.eos_token_id]
        if {whole[-1], self.tokenizer.eos_token_id, self.tokenizer.mask_token_id}.intersection(whole[len(prompt) : -1]):
            return [], "end-of-turn or mask token inside the response"
        if len(whole) > self.limit and self.too_long == "drop":
            return [], f"longer than max_length={self.limit}"
        if len(prompt) >= self.limit:
            return [], f"no response within max_length={self.limit}"
        return whole[: self.limit], ""

    def _encode(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]


def _ending(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """What the chat template puts behind an answer, and the part of it that ends the turn: up to its first special token.

    That part is empty where no special token follows, or only that of the next turn's header, which some templates add unasked.
    """
    require(
        bool(tokenizer.chat_template),
        f"the tokenizer of '{tokenizer.name_or_path}' has no chat template: start from a model that has one, "
        "or put a chat_template.jinja into its directory",
    )
    exchange = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]
    try:
        text = tokenizer.apply_chat_template(exchange, tokenize=False)
    except TemplateError as error:
        raise UserError(f"the chat template of '{tokenizer.name_or_path}' refuses a question and its answer: {error}") from error
    before, found, ending = text.rpartition(ANSWER)
    require(
        bool(found), f"the chat template of '{tokenizer.name_or_path}' leaves out what the assistant says: mend its chat_template.jinja"
    )
    header = before.rpartition(QUESTION)[2]
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    first = min((token for token in special if token in ending), key=ending.index, default=None)
    if first is None or (first != tokenizer.eos_token and 0 <= header.rfind(first) == max(map(header.rfind, special))):
        return ending, ""
    return ending, ending[: ending.index(first) + len(first)]


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that ends an assistant's turn: the chat template's own, or else the end-of-sequence token."""
    ids = tokenizer(_ending(tokenizer)[1], add_special_tokens=False)["input_ids"]
    return int(ids[-1]) if ids else int(tokenizer.eos_token_id)


def _append(rows: dict[str, list[Any]], ids: list[int], numbers: list[int], reason: str) -> None:
    for column, value in zip(rows, (ids, numbers, reason), strict=True):
        rows[column].append(value)


def _pack(batch: dict[str, list[Any]], limit: int, block_size: int, fill: int) -> dict[str, list[Any]]:
    """Put conversations together, first-fit decreasing: the longest first, each into the first row that has room for it.

    Each is filled to a multiple of `block_size`; its fill belongs to its last turn. `document` counts the conversations of
    a row from 0, and `turn` goes on counting across them.
    """
    rows: dict[str, list[list[int]]] = {"input_ids": [], "turn": [], "document": []}
    longest_first = sorted(zip(batch["input_ids"], batch["turn"], strict=True), key=lambda row: -len(row[0]))
    for ids, numbers in longest_first:
        more = -len(ids) % block_size
        room = limit - len(ids) - more
        index = next((index for index, row in enumerate(rows["input_ids"]) if len(row) <= room), len(rows["input_ids"]))
        if index == len(rows["input_ids"]):
            for column in rows.values():
                column.append([])
        turns, documents = rows["turn"][index], rows["document"][index]
        before = turns[-1] if turns else 0
        documents += [documents[-1] + 1 if documents else 0] * (len(ids) + more)
        turns += [number and number + before for number in [*numbers, *numbers[-1:] * more]]
        rows["input_ids"][index] += [*ids, *[fill] * more]
    return rows
