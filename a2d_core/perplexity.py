"""Perplexity: the NELBO of any text with its standard error, and the autoregressive source's loss on the same tokens.

The text is one line of tokens, cut into rows; the first token of a row is given, and all others are scored, the
end-of-sequence tokens between documents too. Numbers come in nats per token, and in bits per byte of the text that the scored
tokens stand for, which models with other tokenizers can be compared in.
"""

# Shapes: B rows of text, L positions, V vocabulary

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import torch
from datasets import Dataset, concatenate_datasets
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from a2d_core import data, launch, likelihood
from a2d_core.config import EvaluateConfig, UserError, require
from a2d_core.models import DiffusionModel

AR_ELEMENTS = 1 << 24
"""Logits of the autoregressive model held at once: 64 MiB of float32."""


def rows_of_text(config: EvaluateConfig, model: DiffusionModel, seed: int) -> Tensor:
    """rows_BL: token ids of at most `config.text_rows` rows, spread evenly over the text, or its held-out part.

    Raises `UserError` where a row exceeds the model's context, and as `data.load_documents` does.
    """
    model.require_room(config.text_length, f"evaluate.text_length={config.text_length}", "lower it")
    train, documents = data.load_documents(str(config.text_dataset), config.reading(), seed)
    if config.text_part == "all":
        documents = _together(train, documents)
    try:
        rows, _ = data.pretraining_rows(documents, model.tokenizer, config.text_length, insert_eos=True)
    except UserError as error:  # it names the fields of a training
        raise UserError(str(error).replace("max_length", "text_length").replace("eval_fraction", "text_fraction")) from None
    count = min(config.text_rows, len(rows))
    return torch.tensor(rows.select([place * len(rows) // count for place in range(count)])["input_ids"][:])


def _together(train: Dataset, held_out: Dataset) -> Dataset:
    """All of a text; a single document was cut in two, and is whole again."""
    if len(train) == len(held_out) == 1:
        return Dataset.from_dict({"text": [train[0]["text"] + held_out[0]["text"]]})
    return concatenate_datasets([train, held_out])


def nelbo(config: EvaluateConfig, model: DiffusionModel, rows_BL: Tensor, seed: int) -> Tensor:
    """nats_B: the NELBO of each row, its first token given. The noise of a row depends on the seed and its number alone."""
    maskable_1L = (torch.arange(rows_BL.shape[1]) > 0).long()[None]

    def score(rows: list[int]) -> list[float]:
        nats: list[float] = []
        for batch in _batches(len(rows), config.batch_size, "scoring text"):
            ids_BL, rows_B = rows_BL[rows[batch]], torch.tensor(rows[batch], device=model.device)
            streams = model.objective.streams(ids_BL, maskable_1L.expand_as(ids_BL)).to(model.device)
            nats += likelihood.nelbo(model, streams, samples=config.nelbo_samples, seed=seed, rows_B=rows_B).nats_B.tolist()
        return nats

    return torch.tensor(launch.divide(range(len(rows_BL)), score))


@torch.no_grad()
def autoregressive(source_dir: str | Path, rows_BL: Tensor, device: torch.device) -> Tensor:
    """nats_B: the autoregressive model's loss on tokens 1..L-1 of each row given those before them, summed.

    Raises `UserError` where it cannot be loaded, or has another vocabulary.
    """
    try:
        network = AutoModelForCausalLM.from_pretrained(source_dir, dtype="auto", use_safetensors=True).to(device).eval()
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load the autoregressive model '{source_dir}': {' '.join(str(error).split())}") from error
    vocabulary = network.config.get_text_config().vocab_size
    require(
        int(rows_BL.max()) < vocabulary,
        f"'{source_dir}' has {vocabulary} tokens and the text has token {int(rows_BL.max())}: it is not the source of this checkpoint",
    )
    nats, size = [], max(1, AR_ELEMENTS // (rows_BL.shape[1] * vocabulary))
    for batch in _batches(len(rows_BL), size, "scoring the autoregressive model"):
        ids_BL = rows_BL[batch].to(device)
        logits_BLV = network(input_ids=ids_BL, use_cache=False).logits[:, :-1].float()
        losses_BL = torch.nn.functional.cross_entropy(logits_BLV.transpose(1, 2), ids_BL[:, 1:], reduction="none")
        nats.append(losses_BL.double().sum(1).cpu())
    return torch.cat(nats)


def byte_counts(tokenizer: PreTrainedTokenizerBase, rows_BL: Tensor) -> Tensor:
    """bytes_B: UTF-8 bytes that the scored tokens of each row stand for; a special token stands for none.

    Exact for byte-level tokenizers, even where a row's end cuts a character; for others a cut character counts as the
    three bytes of U+FFFD.
    """
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special} | set(tokenizer.all_special_ids)
    is_byte_level = "ByteLevel" in str(getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None))

    def count(row: list[int]) -> int:
        if is_byte_level:  # a piece has a character for each byte
            return sum(map(len, tokenizer.convert_ids_to_tokens([token for token in row[1:] if token not in special])))
        whole, given = (len(tokenizer.decode(part, skip_special_tokens=True).encode()) for part in (row, row[:1]))
        return whole - given

    return torch.tensor([count(row) for row in rows_BL.tolist()])


def summary(
    nats_B: Tensor, bytes_B: Tensor, tokens: int, *, ar_B: Tensor | None = None, **others_B: Tensor | None
) -> dict[str, float | None]:
    """Numbers of rows of equal length, `tokens` scored ones in all: `nelbo` in nats per token with its `stderr` over rows, the
    `perplexity_bound`, `bits_per_byte`; `ar_nll` and its like of the autoregressive source, and by how much the bound is above
    it, row by row (`gap`); NAME_nelbo of every other checkpoint. A standard error holds the noise of the estimate too.
    """
    nats_B = nats_B.double()
    result: dict[str, float | None] = {"tokens": tokens, "bytes": int(bytes_B.sum())}
    result |= {"nelbo": None, "stderr": None, "perplexity_bound": None, "ar_nll": None}
    result["nelbo"], result["stderr"] = likelihood.ratio(nats_B, torch.full_like(nats_B, tokens / len(nats_B)))
    result["perplexity_bound"] = math.exp(result["nelbo"] or 0)
    result["bits_per_byte"], result["bits_per_byte_stderr"] = likelihood.ratio(nats_B / math.log(2), bytes_B)
    for name, other_B in others_B.items():
        result[f"{name}_nelbo"] = None if other_B is None else other_B.double().sum().item() / tokens
    if ar_B is not None:
        each_B = torch.full_like(ar_B, tokens / len(ar_B))
        result["ar_nll"], result["ar_stderr"] = likelihood.ratio(ar_B, each_B)
        result["ar_perplexity"] = math.exp(result["ar_nll"] or 0)
        result["ar_bits_per_byte"], result["ar_bits_per_byte_stderr"] = likelihood.ratio(ar_B / math.log(2), bytes_B)
        result["gap"], result["gap_stderr"] = likelihood.ratio(nats_B - ar_B, each_B)
    return result


def _batches(rows: int, size: int, name: str) -> Iterator[slice]:
    for start in tqdm(range(0, rows, size), desc=name, unit="batch", disable=None):
        yield slice(start, start + size)
