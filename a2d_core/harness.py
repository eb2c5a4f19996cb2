"""lm-evaluation-harness runs a diffusion checkpoint through these classes, registered as `a2d_mdlm` and `a2d_bd3lm`.

Text comes from `sampling.generate`. A log-likelihood is minus the NELBO of the continuation given its context and its
length: a lower bound of the diffusion model's own, estimated with noise that a request's tokens and the seed determine.
Importing this module registers both names; `python -m a2d_core evaluate` is the usual way in.
"""

# Shapes: B requests

from __future__ import annotations

import dataclasses
import hashlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from torch import Tensor
from tqdm.auto import tqdm

from a2d_core import likelihood, models, sampling
from a2d_core.config import SampleConfig, UserError, build, require, to_dict
from a2d_core.data import DiffusionCollator
from a2d_core.models import DiffusionModel

GENERATION_ARGUMENTS = ("until", "max_gen_toks", "max_new_tokens", "do_sample", "temperature", "top_p")
"""What a task may ask of a generation; `max_new_tokens` is another name for `max_gen_toks`."""
NOT_OF_A_TASK = {"enabled", "prompts", "chat"}
"""Fields of `SampleConfig` that a task decides itself."""

Pair = tuple[list[int], list[int]]
"""Token ids of a context and of its continuation."""


class DiffusionLM(TemplateLM):
    """A diffusion checkpoint as a model of lm-eval: `pretrained` is a directory, a Hub id, or a model that is loaded already.

    The sampler is `sample`, with the fields of `SampleConfig` that are given as further arguments laid over it
    (`threshold=0.9,batch_size=64`); a task's own `generation_kwargs` win over both. `batch_size` requests are generated or
    scored at once, and a log-likelihood takes `nelbo_samples` noise draws. Raises `UserError` for an unknown field, or a
    checkpoint of another objective than the class is for.
    """

    objective: str | None = None
    """The objective that this class evaluates; None takes any."""

    def __init__(
        self,
        pretrained: str | Path | DiffusionModel,
        *,
        sample: SampleConfig | None = None,
        nelbo_samples: int = 8,
        seed: int = 0,
        device: str | None = None,
        trust_remote_code: bool = False,
        **settings: Any,
    ) -> None:
        super().__init__()
        misplaced = sorted(NOT_OF_A_TASK & set(settings))
        require(not misplaced, f"'{', '.join(misplaced)}' is no setting of an evaluation: the tasks bring their own prompts")
        require(nelbo_samples >= 1, f"nelbo_samples must be at least 1, not {nelbo_samples}")
        self.sample = build(SampleConfig, {**to_dict(sample or SampleConfig()), **settings})
        self.nelbo_samples, self.seed = nelbo_samples, seed
        if isinstance(pretrained, DiffusionModel):
            self.model = pretrained.to(device) if device else pretrained
        else:
            self.model = models.load(pretrained, device=device, trust_remote_code=trust_remote_code)
        found = self.model.spec.objective
        require(
            self.objective in (None, found),
            f"'{self.model.network.name_or_path}' is a {found} checkpoint: evaluate it as a2d_{found}, not as a2d_{self.objective}",
        )
        self.tokenizer = self.model.tokenizer
        self._special = {str(token): index for index, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        self._collate = DiffusionCollator(self.model.objective, self.model.eos_token_id)

    # --- what lm-eval asks of a model -------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.device

    @property
    def max_length(self) -> int | None:
        """Positions of the model's context; None where it has no limit."""
        return self.model.context

    @property
    def eot_token_id(self) -> int:
        """The end-of-sequence token."""
        return self.model.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without context: the beginning-of-sequence token, or else the end of another text."""
        return self.eot_token_id if self.tokenizer.bos_token_id is None else self.tokenizer.bos_token_id

    @property
    def tokenizer_name(self) -> str:
        """Name of the tokenizer."""
        return self.tokenizer.name_or_path.replace("/", "__")

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval's results say about the model."""
        sampler = {name: value for name, value in to_dict(self.sample).items() if name not in NOT_OF_A_TASK}
        return {"a2d": dataclasses.asdict(self.model.spec), "sampler": sampler, "nelbo_samples": self.nelbo_samples, "seed": self.seed}

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The conversation as text; without a generation prompt its last message is left open, to be continued."""
        require(
            bool(self.tokenizer.chat_template),
            f"the tokenizer of '{self.model.network.name_or_path}' has no chat template: evaluate without one (apply_chat_template=false)",
        )
        return self.tokenizer.apply_chat_template(
            chat_history, tokenize=False, add_generation_prompt=add_generation_prompt, continue_final_message=not add_generation_prompt
        )

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids; the tokenizer's own special tokens are added, unless the text (a chat template's) begins with one."""
        if add_special_tokens is None:
            add_special_tokens = not (self.tokenizer.bos_token and string.startswith(self.tokenizer.bos_token))
        return list(self.tokenizer(string, add_special_tokens=add_special_tokens, verbose=False)["input_ids"])

    def _encode_pair(self, context: str, continuation: str) -> Pair:
        """Split where the context ends; only where a token spans that place, the context's last spaces go to the continuation."""
        before, whole = self.tok_encode(context), self.tok_encode(context + continuation)
        if whole[: len(before)] == before:
            return before, whole[len(before) :]
        return super()._encode_pair(context, continuation)

    # --- generation -------------------------------------------------------------------------------

    def sampler_for(self, arguments: Mapping[str, Any]) -> SampleConfig:
        """The sampler that a task's `generation_kwargs` ask for; raises `UserError` for one that is not known."""
        unknown = sorted(set(arguments) - set(GENERATION_ARGUMENTS))
        require(
            not unknown,
            f"unknown generation argument '{', '.join(unknown)}' of a task: a diffusion sampler knows {', '.join(GENERATION_ARGUMENTS)}",
        )
        do_sample = arguments.get("do_sample")
        temperature = arguments.get("temperature", self.sample.temperature or (1.0 if do_sample else 0.0))
        length = arguments.get("max_gen_toks", arguments.get("max_new_tokens", self.sample.max_new_tokens))
        return dataclasses.replace(
            self.sample,
            temperature=0.0 if do_sample is False else float(temperature),
            top_p=float(arguments.get("top_p", self.sample.top_p)),
            max_new_tokens=int(length),
        )

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """An answer for each (context, generation_kwargs), cut before the first of its stop strings."""
        samplers = [self.sampler_for(request.args[1]) for request in requests]
        prompts = [self.tok_encode(request.args[0]) or [self.prefix_token_id] for request in requests]
        for prompt, sampler in zip(prompts, samplers, strict=True):
            self._require_room(len(prompt), sampler.max_new_tokens)
        groups: dict[SampleConfig, list[int]] = defaultdict(list)
        for row, sampler in enumerate(samplers):
            groups[dataclasses.replace(sampler, max_new_tokens=1)].append(row)
        texts = [""] * len(requests)
        with tqdm(total=len(requests), desc="generating", unit="prompt", disable=disable_tqdm or None) as bar:
            for group, rows in groups.items():
                untils = [_listed(requests[row].args[1].get("until") or []) for row in rows]
                finished = sampling.stream(
                    self.model,
                    [prompts[row] for row in rows],
                    group,
                    generator=torch.Generator(self.device).manual_seed(self.seed),
                    max_new_tokens=[samplers[row].max_new_tokens for row in rows],
                    stop=[[stop for stop in until if stop and stop not in self._special] for until in untils],
                    evaluations=False,
                )
                for event in finished:
                    if event.generation is not None:
                        row = rows[event.prompt]
                        texts[row] = self._cut(event.generation.tokens, untils[event.prompt], event.generation.text)
                        self.cache_hook.add_partial("generate_until", requests[row].args, texts[row])
                        bar.update()
        return texts

    def _cut(self, tokens: list[int], until: Sequence[str], text: str | None = None) -> str:
        """The text before the first stop string; a special token is found as a token, since it does not show in the text."""
        stop_ids = {self._special[stop] for stop in until if stop in self._special}
        end = next((place for place, token in enumerate(tokens) if token in stop_ids), len(tokens))
        if text is None or end < len(tokens):
            text = str(self.tokenizer.decode(tokens[:end], skip_special_tokens=True))
        for stop in filter(None, until):
            text = text.partition(stop)[0]
        return text

    # --- likelihood -------------------------------------------------------------------------------

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **options: Any
    ) -> list[tuple[float, bool]]:
        """Minus the NELBO of each continuation, and whether the greedy sampler reproduces it.

        Continuations of one context share their noise, so that the choices of a question are compared with common random numbers.
        """
        pairs = [(context, continuation) for _, context, continuation in requests]
        scores = self._score(pairs, [context for context, _ in pairs], **options)
        answers = list(zip(scores, self._reproduced(pairs), strict=True))
        for (strings, _, _), answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood", strings, answer)
        return answers

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Minus the NELBO of each text; one that is longer than the context is cut, each part given the last token before it."""
        pairs: list[Pair] = []
        owners: list[int] = []
        for owner, request in enumerate(requests):
            ids = [self.prefix_token_id, *self.tok_encode(request.args[0], add_special_tokens=False)]
            width = (self.max_length or max(2, len(ids))) - 1
            starts = range(0, len(ids) - 1, width)
            pairs += [(ids[start : start + 1], ids[start + 1 : start + 1 + width]) for start in starts]
            owners += [owner] * len(starts)
        totals = [0.0] * len(requests)
        scores = self._score(pairs, [context + continuation for context, continuation in pairs], disable_tqdm)
        for owner, score in zip(owners, scores, strict=True):
            totals[owner] += score
        return totals

    def _score(self, pairs: list[Pair], noise_keys: list[list[int]], disable_tqdm: bool = False) -> list[float]:
        """Minus the NELBO in nats of each continuation; pairs with the same noise key share their noise."""
        for context, continuation in pairs:
            self._require_room(len(context), len(continuation))
        scores = [0.0] * len(pairs)
        longest_first = sorted((row for row in range(len(pairs)) if pairs[row][1]), key=lambda row: -len(pairs[row][0] + pairs[row][1]))
        with tqdm(total=len(longest_first), desc="scoring", unit="text", disable=disable_tqdm or None) as bar:
            for batch in _batches(longest_first, self.sample.batch_size):
                nats_B = self._nelbo([pairs[row] for row in batch], [noise_keys[row] for row in batch])
                for row, nats in zip(batch, nats_B.tolist(), strict=True):
                    scores[row] = -nats
                bar.update(len(batch))
        return scores

    def _nelbo(self, pairs: list[Pair], noise_keys: list[list[int]]) -> Tensor:
        rows = [{"input_ids": a + b, "turn": [0] * len(a) + [1] * len(b)} for a, b in pairs]
        streams = self._collate(rows)["streams"].to(self.device)
        rows_B = torch.tensor([_number(key) for key in noise_keys], device=self.device)
        return likelihood.nelbo(self.model, streams, samples=self.nelbo_samples, seed=self.seed, rows_B=rows_B).nats_B

    def _reproduced(self, pairs: list[Pair]) -> list[bool]:
        """Whether the greedy sampler, asked for as many tokens, writes this continuation after its context.

        A row is given up at the first token that is another one.
        """
        sampler = dataclasses.replace(self.sample, temperature=0.0, policy="confidence", stop=(), min_new_tokens=0)
        stop_ids = set(self.model.stop_token_ids)
        asked = list(dict.fromkeys((tuple(context), tuple(continuation)) for context, continuation in pairs if continuation))
        # A generation is trimmed before its stop token, whichever that is.
        wanted = [continuation[:-1] if continuation[-1] in stop_ids else continuation for _, continuation in asked]
        contexts, lengths = [context for context, _ in asked], [len(continuation) for _, continuation in asked]
        found = sampling.generate(self.model, contexts, sampler, max_new_tokens=lengths, expected=wanted) if asked else []
        is_same = {pair: tuple(g.tokens) == want for pair, g, want in zip(asked, found, wanted, strict=True)}
        return [not continuation or is_same[tuple(context), tuple(continuation)] for context, continuation in pairs]

    def _require_room(self, context: int, answer: int) -> None:
        if self.max_length is not None and context + answer > self.max_length:
            raise UserError(
                f"a request has a context of {context} tokens and an answer of {answer}, and the model has {self.max_length} positions: "
                "lower num_fewshot or the task's max_gen_toks, or leave the task out"
            )


@register_model("a2d_mdlm")
class MDLM(DiffusionLM):
    """A masked diffusion checkpoint (MDLM) as a model of lm-eval."""

    objective = "mdlm"


@register_model("a2d_bd3lm")
class BD3LM(DiffusionLM):
    """A block diffusion checkpoint (BD3LM) as a model of lm-eval."""

    objective = "bd3lm"


def _listed(until: str | Sequence[str]) -> Sequence[str]:
    return [until] if isinstance(until, str) else until


def _batches(rows: list[int], size: int) -> Iterator[list[int]]:
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def _number(tokens: list[int]) -> int:
    """A row number for the noise, the same wherever these tokens are scored."""
    digest = hashlib.sha256(",".join(map(str, tokens)).encode()).digest()
    return int.from_bytes(digest[:7], "big")
