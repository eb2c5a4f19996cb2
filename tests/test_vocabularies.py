"""Real vocabularies, each with a tokenizer made here: mask, pad and end never collide, and a generated pad moves nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import network
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers import models as kinds
from transformers import PreTrainedTokenizerFast

from a2d_core import conversion, data, embedded, models, sampling
from a2d_core.config import ConvertConfig, SampleConfig, UserError

TEMPLATE = embedded.CHAT_TEMPLATE
QWEN_WORDS, QWEN_ADDED, QWEN_ROWS = 151_643, 26, 151_936


def byte_level(words: int = 0, **special) -> PreTrainedTokenizerFast:
    """GPT-2's kind: an alphabet of bytes, and so many words more."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {text: i for i, text in enumerate([*alphabet, *(f"w{i}" for i in range(words - len(alphabet)))])}
    tokenizer = Tokenizer(kinds.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=TEMPLATE, **special)


def sentencepiece(**special) -> PreTrainedTokenizerFast:
    """Llama's kind: unk, bos and eos first, then bytes to fall back on, and pieces in which U+2581 is a space."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", *"abcdefghijklmnopqrstuvwxyz"]
    tokenizer = Tokenizer(
        kinds.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[], unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", chat_template=TEMPLATE, **special
    )


def qwen() -> PreTrainedTokenizerFast:
    """Qwen's layout: 151,643 words, 26 added tokens behind them, pad and end two of these."""
    tokenizer = byte_level(QWEN_WORDS)
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|added_{i}|>" for i in range(QWEN_ADDED - 3))]
    tokenizer.add_tokens([AddedToken(name, special=True, normalized=False) for name in names], special_tokens=True)
    tokenizer.eos_token, tokenizer.pad_token = "<|im_end|>", "<|endoftext|>"
    return tokenizer


TOKENIZERS = {
    "byte-level": lambda: byte_level(eos_token="<|end|>", pad_token="<|pad|>"),
    "sentencepiece": sentencepiece,
    "without-pad": lambda: byte_level(eos_token="<|end|>"),
    "pad-is-eos": lambda: byte_level(eos_token="<|end|>", pad_token="<|end|>"),
    "with-mask": lambda: byte_level(eos_token="<|end|>", pad_token="<|pad|>", mask_token="[MASK]"),
    "mask-is-pad": lambda: byte_level(eos_token="<|end|>", pad_token="<|pad|>", mask_token="<|pad|>"),
}


def convert(tokenizer: PreTrainedTokenizerFast, folder: Path, rows: int | None = None, config: ConvertConfig | None = None, **changes):
    """The converted model, loaded again; its embedding has `rows` rows (default: one for each token)."""
    options = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": tokenizer.bos_token_id}
    network(vocab_size=rows or len(tokenizer), **{**options, **changes}).save_pretrained(folder / "source")
    tokenizer.save_pretrained(folder / "source")
    conversion.convert(config or ConvertConfig(block_size=4), "bd3lm", folder / "source", folder / "out")
    return models.load(folder / "out")


def specials(model) -> list[int]:
    ids = (model.tokenizer.eos_token_id, model.tokenizer.pad_token_id, model.tokenizer.bos_token_id, model.tokenizer.unk_token_id)
    return [i for i in ids if i is not None]


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_the_mask_is_a_token_of_its_own_that_text_never_holds(kind, tmp_path):
    model = convert(TOKENIZERS[kind](), tmp_path)
    mask = model.spec.mask_token_id
    assert mask == model.tokenizer.mask_token_id and mask not in specials(model) and mask not in model.stop_token_ids
    assert mask < model.network.get_input_embeddings().weight.shape[0]
    text = "the quick brown fox: <mask> [mask] é 漢"
    ids = model.encode(text, chat=False)
    assert mask not in ids and model.tokenizer.decode(ids, skip_special_tokens=True).strip() == text
    assert mask not in model.encode(text)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_it_is_trained_on_and_generates_without_the_mask_or_a_pad_in_between(kind, tmp_path):
    """Rows of several lengths: what fills them is neither attended nor scored, whatever its token."""
    model = convert(TOKENIZERS[kind](), tmp_path)
    rows = [{"input_ids": model.encode("abc", chat=False), "turn": [1] * len(model.encode("abc", chat=False))} for _ in range(2)]
    rows[1] = {key: value * 3 for key, value in rows[1].items()}
    collate = data.DiffusionCollator(model.objective, model.eos_token_id, "block")
    streams = collate(rows)["streams"]
    assert model.spec.mask_token_id not in streams.noised_ids_BT
    prompts = [model.encode(text, chat=False) for text in ("a", "abcdef", "abc")]
    together = sampling.generate(model, prompts, SampleConfig(max_new_tokens=9, batch_size=3))
    apart = [sampling.generate(model, [prompt], SampleConfig(max_new_tokens=9))[0] for prompt in prompts]
    assert [g.tokens for g in together] == [g.tokens for g in apart]
    assert all(model.spec.mask_token_id not in g.tokens for g in together)


def test_qwens_mask_takes_the_first_unused_row_and_the_matrix_stays(tmp_path):
    tokenizer = qwen()
    assert len(tokenizer) == QWEN_WORDS + QWEN_ADDED
    model = convert(tokenizer, tmp_path, QWEN_ROWS, num_hidden_layers=1, hidden_size=8, intermediate_size=8, tie_word_embeddings=True)
    assert model.spec.mask_token_id == QWEN_WORDS + QWEN_ADDED == 151_669
    rows = model.network.get_input_embeddings().weight
    assert len(rows) == QWEN_ROWS and 0.5 < rows[151_669].norm() / rows[:151_669].norm(dim=1).mean() < 1.6
    assert {model.tokenizer.eos_token_id, model.tokenizer.pad_token_id} == {151_645, 151_643}


def test_a_full_matrix_grows_by_a_row(tmp_path):
    tokenizer = byte_level(eos_token="<|end|>")
    model = convert(tokenizer, tmp_path)
    assert model.spec.mask_token_id == len(tokenizer) == len(model.network.get_input_embeddings().weight) - 1


def test_a_reserved_token_can_be_the_mask(tmp_path):
    tokenizer = byte_level(eos_token="<|end|>", extra_special_tokens=["<|reserved_0|>"])
    model = convert(tokenizer, tmp_path, config=ConvertConfig(mask_token="<|reserved_0|>"))
    assert model.spec.mask_token_id == tokenizer.convert_tokens_to_ids("<|reserved_0|>")
    assert len(model.network.get_input_embeddings().weight) == len(tokenizer)


@pytest.mark.parametrize("text", ["a", "<|end|>"], ids=["a word", "the end"])
def test_a_mask_that_means_something_else_is_refused(text, tmp_path):
    with pytest.raises(UserError, match=r"stands for something else: choose another with convert.mask_token=TEXT"):
        convert(byte_level(eos_token="<|end|>"), tmp_path, config=ConvertConfig(mask_token=text))


def test_a_generated_pad_is_a_token_like_any_other(tmp_path, monkeypatch):
    """Published samplers count the tokens that are not pads: there a pad in an answer moves all that follows it."""
    model = convert(byte_level(eos_token="<|end|>", pad_token="<|pad|>", extra_special_tokens=["<|other|>"]), tmp_path)
    hidden = model.hidden

    def positions_while_generating(token: str) -> list[torch.Tensor]:
        wanted, seen = model.tokenizer.convert_tokens_to_ids(token), []
        monkeypatch.setattr(
            model, "hidden", lambda ids, slots, *more, **named: seen.append(slots.position) or hidden(ids, slots, *more, **named)
        )
        others = tuple(token for token in range(model.network.config.vocab_size) if token != wanted)
        config = SampleConfig(max_new_tokens=9, suppressed_tokens=others)
        generation = sampling.generate(model, [model.encode("abc", chat=False)], config)[0]
        assert generation.tokens == [wanted] * 9 and not generation.finished
        return seen

    pairs = zip(positions_while_generating("<|pad|>"), positions_while_generating("<|other|>"), strict=True)
    assert all(torch.equal(*pair) for pair in pairs)
