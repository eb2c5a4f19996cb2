"""The embedded default: a corpus, a tokenizer, an autoregressive model and word tasks, from what ships with Python.

Nothing here reaches a network, and everything is determined by the version of Python and by a seed. The model is
trained once per content (`build_base`) and kept in the cache directory: $A2D_CACHE, or else ~/.cache/a2d.
"""
# Shapes: B batch, L positions, V vocabulary, T tokens of a whole text

from __future__ import annotations

import ast
import dataclasses
import fcntl
import functools
import hashlib
import json
import math
import os
import random
import re
import shutil
import sysconfig
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM, get_cosine_schedule_with_warmup

from a2d_core.config import UserError, require
from a2d_core.models import attention_kernel, multiplies_bfloat16

# --- corpus ---------------------------------------------------------------------------------------

MODULES = """
    argparse ast bdb calendar cmd codecs concurrent/futures/_base configparser contextlib datetime _pydatetime _pydecimal
    difflib doctest email/message enum fileinput fractions ftplib functools getopt http/client http/server imaplib inspect
    _pyio ipaddress json/__init__ logging/__init__ logging/handlers mailbox mimetypes numbers optparse os pathlib pdb pickle
    pickletools pkgutil platform pydoc queue random selectors shelve shutil site smtplib socket socketserver ssl statistics
    string subprocess tarfile tempfile textwrap threading timeit tokenize traceback typing unittest/case unittest/mock
    urllib/parse urllib/request uuid xml/dom/minidom xml/etree/ElementTree xmlrpc/client zipfile
""".split()
"""Standard-library modules whose docstrings join the corpus; those that this Python lacks are left out."""


@functools.cache
def corpus() -> tuple[str, ...]:
    """The documents, about 0.9 MB of English: Python's help topics and the docstrings of `MODULES`, one document each.

    A paragraph that an earlier document has is left out, so that no text is both trained on and held out.
    Raises `UserError` where this Python comes without them.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise UserError("this Python has no pydoc_data.topics, the embedded corpus: install Python's full standard library") from error
    documents = [topics[name] for name in sorted(topics)]
    library = Path(sysconfig.get_paths()["stdlib"])
    documents += [_docstrings(path) for name in MODULES if (path := library / f"{name}.py").exists()]
    seen: set[str] = set()
    return tuple(text for document in documents if (text := _unseen_paragraphs(document, seen)))


@functools.cache
def corpus_split() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The documents as (train, held out): in the order of their hashes, whole documents that make up 5% are held out."""
    room = sum(map(len, corpus())) // 20
    held_out = set()
    for document in sorted(corpus(), key=_digest):
        if len(document) <= room:
            held_out.add(document)
            room -= len(document)
    return tuple(d for d in corpus() if d not in held_out), tuple(d for d in corpus() if d in held_out)


def _docstrings(path: Path) -> str:
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    tree = ast.parse(path.read_bytes())
    return "\n\n".join(text for node in ast.walk(tree) if isinstance(node, documented) and (text := ast.get_docstring(node)))


def _unseen_paragraphs(document: str, seen: set[str]) -> str:
    kept = []
    for paragraph in document.split("\n\n"):
        key = " ".join(paragraph.split())
        if key and key not in seen:
            seen.add(key)
            kept.append(paragraph)
    return "\n\n".join(kept)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


# --- tokenizer ------------------------------------------------------------------------------------

PAD, END, ROLES = "<|pad|>", "<|end|>", ("<|user|>", "<|assistant|>", "<|system|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
CONTEXT = 512
"""Positions of the embedded model."""


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token per byte of UTF-8, so that it spells any text, and a chat template.

    `<|end|>` ends a document, a turn and a row (eos); `<|pad|>` is never attended.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={character: i for i, character in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in (PAD, END, *ROLES)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        extra_special_tokens=list(ROLES),
        chat_template=CHAT_TEMPLATE,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


# --- word tasks -----------------------------------------------------------------------------------

TASKS: dict[str, tuple[str, Callable[[str], str]]] = {
    "words_reverse": ("Reverse", lambda word: word[::-1]),
    "words_upper": ("Upper", str.upper),
    "words_sort": ("Sort", lambda word: "".join(sorted(word))),
    "words_last": ("Last", lambda word: word[-1]),
    "words_repeat": ("Repeat", lambda word: f"{word}-{word}"),
}
"""Task -> (the instruction's verb, word -> answer). A prompt is at most 15 bytes: 'Reverse: planet' -> 'tenalp'."""
TEST_WORDS = 200


@functools.cache
def words() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(train, test) words of 3 to 6 letters that at least three documents of the corpus use; 200 are test words."""
    word_alone = re.compile(r"(?<![\w.`'\"-])[a-z]{3,6}(?![\w.(`'\"=-])")  # not part of a name, a call or a literal
    in_documents = Counter(word for document in corpus() for word in set(word_alone.findall(document)))
    real = sorted((word for word, count in in_documents.items() if count >= 3), key=_digest)
    return tuple(real[TEST_WORDS:]), tuple(real[:TEST_WORDS])


def instructions(split: str, rows: int | None = None, seed: int = 0) -> list[dict[str, Any]]:
    """Conversations {"messages": [user, assistant], "task": ..., "word": ...}, the tasks in turn.

    test: every task for every test word (`rows` of them, or all 1,000). train: `rows` draws by `seed`, half of them real
    words and half random letters of the same lengths, never a test word, so that the operation must be learnt.
    Raises `UserError` for another split, and for train without `rows`.
    """
    require(split in ("train", "test"), f"unknown split '{split}' of the embedded tasks: choose train or test")
    train_words, test_words = words()
    if split == "test":
        return [_instruction(task, word) for word in test_words for task in TASKS][:rows]
    require(rows is not None, "the embedded training tasks are endless: say how many rows")
    draw, tasks = random.Random(seed), list(TASKS)
    return [_instruction(tasks[row % len(tasks)], _training_word(draw, train_words, test_words)) for row in range(rows or 0)]


def chance_level(task: str) -> float:
    """Expected exact match on the test words of a guess that uses the word's own letters in random order.

    It knows how many letters the answer has, and which; not how the task arranges them. An upper-case letter and a hyphen
    are not among them, so that words_upper and words_repeat have chance 0.
    """
    _, answer = TASKS[task]
    return sum(_chance(word, answer(word)) for word in words()[1]) / TEST_WORDS


def _training_word(draw: random.Random, real: tuple[str, ...], excluded: Iterable[str]) -> str:
    if draw.random() < 0.5:
        return draw.choice(real)
    while True:
        word = "".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(3, 6)))
        if word not in excluded:
            return word


def _instruction(task: str, word: str) -> dict[str, Any]:
    verb, answer = TASKS[task]
    messages = [{"role": "user", "content": f"{verb}: {word}"}, {"role": "assistant", "content": answer(word)}]
    return {"messages": messages, "task": task, "word": word}


def _chance(word: str, answer: str) -> float:
    letters = Counter(word)
    if len(answer) == 1:
        return letters[answer] / len(word)
    arrangements = math.factorial(len(word)) / math.prod(map(math.factorial, letters.values()))
    return 1 / arrangements if Counter(answer) == letters else 0.0


# --- autoregressive base --------------------------------------------------------------------------

FORMAT = 1
"""Raised when the code below changes what it trains, so that no cache hands out an older model."""


@dataclass(frozen=True)
class Size:
    """An embedded model and the budget it is trained with."""

    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    intermediate_size: int
    steps: int
    batch_size: int
    row_length: int = 128
    learning_rate: float = 3e-3

    def config(self, tokenizer: PreTrainedTokenizerFast) -> Qwen3Config:
        """The Qwen3 configuration of this size."""
        return Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=self.hidden_size,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.hidden_size // self.heads,
            intermediate_size=self.intermediate_size,
            max_position_embeddings=CONTEXT,
            initializer_range=0.06,  # of a width this small; 0.02 costs 0.06 nats per byte
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )


SIZES = {
    "tiny": Size(hidden_size=128, layers=3, heads=4, kv_heads=2, intermediate_size=768, steps=1200, batch_size=8, learning_rate=2e-3),
    "smoke": Size(hidden_size=64, layers=2, heads=2, kv_heads=1, intermediate_size=128, steps=60, batch_size=8, row_length=64),
}


def build_base(size: str = "tiny", seed: int = 0) -> Path:
    """The directory of the embedded autoregressive model; trained by the first call, found by the later ones.

    The directory holds safetensors, the tokenizer, and training.json: steps, seconds, and the final training loss and
    held-out loss in nats per token (per byte; the first token of a row of `row_length` is given). Two processes that ask
    for the same model train it once. Raises `UserError` for an unknown size or a cache that cannot be written.
    """
    require(size in SIZES, f"unknown embedded model '{size}': choose one of {', '.join(SIZES)}")
    recipe, tokenizer = SIZES[size], build_tokenizer()
    cache = Path(os.environ.get("A2D_CACHE") or Path.home() / ".cache" / "a2d")
    directory = cache / f"embedded-{size}-{_key(recipe, tokenizer, seed)[:16]}"
    if directory.exists():
        return directory
    try:
        cache.mkdir(parents=True, exist_ok=True)
        lock = directory.with_suffix(".lock").open("w")
    except OSError as error:
        raise UserError(f"cannot write the cache directory {cache} ({error.strerror}): set A2D_CACHE to one that you can write") from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not directory.exists():
            _build(directory, recipe, tokenizer, seed)
    return directory


def train_base(recipe: Size, tokenizer: PreTrainedTokenizerFast, seed: int) -> tuple[Qwen3ForCausalLM, dict[str, float]]:
    """Train on rows that start anywhere in the training text; returns the model and its losses in nats per token.

    Runs on the CPU from its own generators, in bfloat16 with float32 weights where the hardware multiplies that: the same
    seed and number of threads give the same weights on the same machine, and torch's global generator is left as it was.
    """
    train_T, held_out_T = (_tokens(documents, tokenizer) for documents in corpus_split())
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = Qwen3ForCausalLM(recipe.config(tokenizer))
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    schedule = get_cosine_schedule_with_warmup(optimizer, recipe.steps // 20, recipe.steps)
    offsets_L, losses = torch.arange(recipe.row_length), []
    steps = tqdm(range(recipe.steps), desc="training the embedded model", unit="step", disable=None)
    for step in steps:
        starts_B = torch.randint(len(train_T) - recipe.row_length, (recipe.batch_size,), generator=generator)
        with torch.autocast("cpu", torch.bfloat16, enabled=multiplies_bfloat16()), attention_kernel(model.device):
            loss = _next_token_loss(model, train_T[starts_B[:, None] + offsets_L])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
        if steps.disable and (step + 1) % max(1, recipe.steps // 4) == 0:  # no terminal: a line now and then
            print(f"training the embedded model: step {step + 1}/{recipe.steps}  loss {loss.item():.3f}", flush=True)
    rows = len(held_out_T) // recipe.row_length
    with torch.no_grad():
        chunks = held_out_T[: rows * recipe.row_length].view(rows, -1).split(64)
        held_out = sum(_next_token_loss(model.eval(), chunk_BL).item() * len(chunk_BL) for chunk_BL in chunks) / rows
    return model, {"loss": torch.stack(losses[-20:]).mean().item(), "held_out_loss": held_out}


def _next_token_loss(model: Qwen3ForCausalLM, input_ids_BL: torch.Tensor) -> torch.Tensor:
    logits_BLV = model(input_ids=input_ids_BL, use_cache=False).logits[:, :-1]
    return F.cross_entropy(logits_BLV.flatten(0, 1).float(), input_ids_BL[:, 1:].flatten())


def _tokens(documents: Iterable[str], tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """The documents as one line of token ids, each closed by the end-of-sequence token."""
    encoded = [[*ids, tokenizer.eos_token_id] for ids in tokenizer(list(documents), verbose=False)["input_ids"]]
    return torch.tensor([token for ids in encoded for token in ids])


def _key(recipe: Size, tokenizer: PreTrainedTokenizerFast, seed: int) -> str:
    config = {name: value for name, value in recipe.config(tokenizer).to_dict().items() if name != "transformers_version"}
    parts = [FORMAT, seed, corpus_split(), tokenizer.backend_tokenizer.to_str(), CHAT_TEMPLATE, config, dataclasses.asdict(recipe)]
    return _digest(json.dumps(parts, sort_keys=True, default=str))


def _build(directory: Path, recipe: Size, tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
    """Train into a temporary directory, and give it its name once it is complete."""
    started = time.monotonic()
    model, losses = train_base(recipe, tokenizer, seed)
    unfinished = Path(tempfile.mkdtemp(prefix=".unfinished-", dir=directory.parent))
    try:
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        record = {"steps": recipe.steps, "seconds": round(time.monotonic() - started, 1), **losses}
        (unfinished / "training.json").write_text(json.dumps(record, indent=2) + "\n")
        unfinished.chmod(0o755)
        unfinished.replace(directory)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
