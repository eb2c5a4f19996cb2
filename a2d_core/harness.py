"""lm-evaluation-harness runs a diffusion checkpoint through these classes, registered as `a2d_mdlm` and `a2d_bd3lm`.

Text comes from `sampling.generate`. A log-likelihood is that of the continuation given its context and its length:
minus the NELBO, a lower bound estimated with noise that a question's tokens and the seed determine, or the exact one of a
fixed reveal order (`scoring`). Processes of one group share the requests out, and each has all answers.
Importing this module registers both names; `python -m a2d_core evaluate` is the usual way in, `python -m a2d_core lm-eval`
is lm-eval's own command, and `--tasks .../a2d_core/tasks/plugin.yaml,...` makes the plain `lm_eval` import it.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections import defaultdict
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.api.task import Task
from tqdm.auto import tqdm

from a2d_core import launch, models, sampling, tasks
from a2d_core.config import SampleConfig, UserError, require
from a2d_core.models import DiffusionModel
from a2d_core.scoring import Answer, Score, Scorer
from a2d_core.settings import build, to_dict

GENERATION_ARGUMENTS = ("until", "max_gen_toks", "max_new_tokens", "do_sample", "temperature", "top_p", "top_k")
"""What a task may ask of a generation; `max_new_tokens` is another name for `max_gen_toks`, and `num_beams` may be 1."""
NOT_OF_A_TASK = {"enabled", "prompts", "chat"}
"""Fields of `SampleConfig` that a task decides itself."""

REQUESTS = ("generate_until", "loglikelihood", "loglikelihood_rolling")
"""Kinds of requests."""

Pair = tuple[list[int], list[int]]
"""Token ids of a context and of its continuation."""


@dataclass(frozen=True)
class _Asked:
    """A continuation that is to be scored."""

    pair: Pair
    text: str
    question: Hashable
    """What the answers to one question have in common."""
    wants_greedy: bool
    """Whether anybody reads that the greedy sampler reproduces it."""


class DiffusionLM(TemplateLM):
    """A diffusion checkpoint as a model of lm-eval: `pretrained` is a directory, a Hub id, or a model that is loaded already.

    The sampler is `sample`, with the fields of `SampleConfig` that are given as further arguments laid over it
    (`threshold=0.9,batch_size=64`); a task's own `generation_kwargs` win over both. `likelihood`, `order`, `nelbo_samples`,
    `max_nelbo_samples`, `batch_tokens` and `seed` are the fields of `Scorer`. Raises `UserError` for an unknown field, or a
    checkpoint of another objective than the class is for.
    """

    objective: str | None = None
    """The objective that this class evaluates; None takes any."""

    def __init__(
        self,
        pretrained: str | Path | DiffusionModel,
        *,
        sample: SampleConfig | None = None,
        likelihood: str = "nelbo",
        order: str = "confidence",
        nelbo_samples: int = 8,
        max_nelbo_samples: int = 64,
        batch_tokens: int = 4096,
        batch_size: int | str = "auto",
        seed: int = 0,
        device: str | None = None,
        trust_remote_code: bool = False,
        **settings: Any,
    ) -> None:
        super().__init__()
        misplaced = sorted(NOT_OF_A_TASK & set(settings))
        require(not misplaced, f"'{', '.join(misplaced)}' is no setting of an evaluation: the tasks bring their own prompts")
        if batch_size != "auto":  # lm-eval's command line passes a text
            settings["batch_size"] = int(batch_size) if str(batch_size).isdecimal() else batch_size
        self.sample = build(SampleConfig, {**to_dict(sample or SampleConfig()), **settings})
        several = PartialState().num_processes > 1  # it joins the group, and chooses this process's device
        if several or (str(device).startswith("cuda") and not torch.cuda.is_available()):
            device = None  # lm-eval's command asks for cuda:0 unless it is told otherwise
        if isinstance(pretrained, DiffusionModel):
            self.model = pretrained.to(device) if device else pretrained
        else:
            self.model = models.load(pretrained, objective=self.objective, device=device, trust_remote_code=trust_remote_code)
        found = self.model.spec.objective
        require(
            self.objective in (None, found),
            f"'{self.model.network.name_or_path}' is a {found} checkpoint: evaluate it as a2d_{found}, not as a2d_{self.objective}",
        )
        self.seed = seed
        self.scorer = Scorer(self.model, likelihood, order, nelbo_samples, max_nelbo_samples, batch_tokens, seed)
        self.tokenizer = self.model.tokenizer
        self._special = {str(token): index for index, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        self.scores: dict[tuple[str | None, int | None, int], Score] = {}
        """The likelihoods with their standard errors, by the task, the document, and the place of the request in that."""
        self.efforts: dict[tuple[str | None, int | None, int], dict[str, float]] = {}
        """What generating took, by the same: `nfe`, `tokens` through the first that ends the answer, and what else the sampler says."""
        self._planned: list[Task] | None = None
        self._reads_greedy: set[str | None] | None = None

    def plan(self, planned: Iterable[Task]) -> None:
        """Say which tasks will be run: all their requests are then checked before the first is answered, and whether the greedy
        sampler reproduces a continuation is found out only for those whose metrics read it (it is False for the others).

        Raises `UserError` for a generation argument that is not known.
        """
        self._planned = list(planned)
        self._reads_greedy = {task.config.task for task in self._planned if tasks.reads_is_greedy(task)}
        for task in self._planned:
            self.sampler_for(task.config.generation_kwargs or {})

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
        scorer = {field.name: getattr(self.scorer, field.name) for field in dataclasses.fields(self.scorer) if field.name != "model"}
        return {
            "a2d": dataclasses.asdict(self.model.spec),
            "sampler": sampler,
            "likelihood": {**scorer, **_summary(list(self.scores.values()))},
        }

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The conversation as text; without a generation prompt its last message is left open, to be continued."""
        self.model.require_chat_template("evaluate without one (apply_chat_template=false)")
        return self.tokenizer.apply_chat_template(
            chat_history, tokenize=False, add_generation_prompt=add_generation_prompt, continue_final_message=not add_generation_prompt
        )

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids; the tokenizer's own special tokens are added, unless the text (a chat template's) begins with one."""
        if add_special_tokens is None:
            add_special_tokens = not (self.tokenizer.bos_token and string.startswith(self.tokenizer.bos_token))
        return list(self.tokenizer(string, add_special_tokens=add_special_tokens, verbose=False)["input_ids"])

    def check(self, requests: Iterable[Instance]) -> None:
        """Raise `UserError` where a request cannot be answered; nothing is computed."""
        for request in requests:
            name = f"task '{request.task_name}': " if request.task_name else ""
            kind, arguments = str(request.request_type), request.args
            require(kind in REQUESTS, f"{name}requests of type '{kind}' are not supported, only {', '.join(REQUESTS)}: leave the task out")
            try:
                if kind == "generate_until":
                    self._require_room(len(self._prompt(arguments[0])), self.sampler_for(arguments[1]).max_new_tokens)
                elif kind == "loglikelihood":
                    self._require_room(*map(len, self._pair(*arguments)))
            except UserError as error:
                raise UserError(f"{name}{error}") from None

    def _check_first(self, requests: list[Instance]) -> None:
        """Before the first answer: the requests of all tasks, which lm-eval has made by now."""
        if self._planned is None:
            self.check(requests)
        else:
            self.check(request for task in self._planned for request in task.instances)
            self._planned = []  # once is enough

    def _prompt(self, context: str) -> list[int]:
        return self.tok_encode(context) or [self.prefix_token_id]

    def _pair(self, context: str, continuation: str) -> Pair:
        """Token ids of a context, which has at least one, and of what follows it."""
        if context:
            return self._encode_pair(context, continuation)
        tokens = self.tok_encode(continuation, add_special_tokens=False)
        return (tokens[:1], tokens[1:]) if tokens[:1] == [self.prefix_token_id] else ([self.prefix_token_id], tokens)

    def _encode_pair(self, context: str, continuation: str) -> Pair:
        """Split where the context ends; only where a token spans that place, the context's last spaces go to the continuation."""
        before, whole = self.tok_encode(context), self.tok_encode(context + continuation)
        if whole[: len(before)] == before:
            return before, whole[len(before) :]
        return super()._encode_pair(context, continuation)

    # --- generation -------------------------------------------------------------------------------

    def sampler_for(self, arguments: Mapping[str, Any]) -> SampleConfig:
        """The sampler that a task's `generation_kwargs` ask for; raises `UserError` for one that is not known, or out of range."""
        one_beam = {"num_beams"} if arguments.get("num_beams") == 1 else set()
        unknown = sorted(set(arguments) - set(GENERATION_ARGUMENTS) - one_beam)
        require(
            not unknown,
            f"unknown generation argument '{', '.join(unknown)}' of a task: a diffusion sampler knows {', '.join(GENERATION_ARGUMENTS)}",
        )
        _listed(arguments.get("until"))
        do_sample = arguments.get("do_sample")
        drawn = self.sample.temperature or (1.0 if do_sample else 0.0)
        changes = {
            "temperature": 0.0 if do_sample is False else arguments.get("temperature", drawn),
            "top_p": arguments.get("top_p", self.sample.top_p),
            "top_k": arguments.get("top_k", self.sample.top_k),
            "max_new_tokens": arguments.get("max_gen_toks", arguments.get("max_new_tokens", self.sample.max_new_tokens)),
        }
        return build(SampleConfig, {**to_dict(self.sample), **changes}, "generation_kwargs")

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """An answer for each (context, generation_kwargs), cut before the first of its stop strings."""
        self._check_first(requests)
        answers = launch.divide(list(enumerate(requests)), lambda part: self._generate(dict(part), disable_tqdm))
        for request, (_, effort) in zip(requests, answers, strict=True):
            self.efforts[request.task_name, request.doc_id, request.idx] = effort
        return [text for text, _ in answers]

    def _generate(self, numbered: dict[int, Instance], disable_tqdm: bool) -> list[tuple[str, dict[str, float]]]:
        """The answers to requests, whose draws depend on their numbers, and not on what else is asked here."""
        numbers, requests = list(numbered), list(numbered.values())
        samplers = [self.sampler_for(request.args[1]) for request in requests]
        prompts = [self._prompt(request.args[0]) for request in requests]
        groups: dict[SampleConfig, list[int]] = defaultdict(list)
        for row, sampler in enumerate(samplers):
            groups[dataclasses.replace(sampler, max_new_tokens=1)].append(row)
        answers: list[tuple[str, dict[str, float]]] = [("", {})] * len(requests)
        with tqdm(total=len(requests), desc="generating", unit="prompt", disable=self._hides(disable_tqdm)) as bar:
            for group, rows in groups.items():
                untils = [_listed(requests[row].args[1].get("until")) for row in rows]
                finished = sampling.stream(
                    self.model,
                    [prompts[row] for row in rows],
                    group,
                    generator=torch.Generator(self.device).manual_seed(self.seed),
                    max_new_tokens=[samplers[row].max_new_tokens for row in rows],
                    stop=[[stop for stop in until if stop and stop not in self._special] for until in untils],
                    keys=[numbers[row] for row in rows],
                    evaluations=False,
                )
                for event in finished:
                    if event.generation is not None:
                        row = rows[event.prompt]
                        text = self._cut(event.generation.tokens, event.generation.text, untils[event.prompt])
                        answers[row] = text, _effort(event.generation)
                        self._remember("generate_until", requests[row].args, text)
                        bar.update()
        return answers

    def _cut(self, tokens: list[int], text: str, until: Sequence[str]) -> str:
        """The text of the tokens before the first stop string; a special token is found as a token, since it does not show in the text."""
        stop_ids = {self._special[stop] for stop in until if stop in self._special}
        end = next((place for place, token in enumerate(tokens) if token in stop_ids), len(tokens))
        if end < len(tokens):
            text = str(self.tokenizer.decode(tokens[:end], skip_special_tokens=True))
        for stop in filter(None, until):
            text = text.partition(stop)[0]
        return text

    # --- likelihood -------------------------------------------------------------------------------

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """The log-likelihood of each continuation, and whether the greedy sampler reproduces it.

        The requests of one document are the answers to one question: they share their noise, and are drawn until it is decided.
        """
        self._check_first(requests)
        asked = []
        for request in requests:
            question = request.args[0] if request.doc_id is None else (request.task_name, request.doc_id)
            wants_greedy = self._reads_greedy is None or request.task_name in self._reads_greedy
            asked.append(_Asked(self._pair(*request.args), request.args[1], question, wants_greedy))
        answers = []
        for request, (score, same) in zip(requests, self._answer(asked, disable_tqdm), strict=True):
            answers.append((self._record(request, score), same))
            self._remember("loglikelihood", request.args, answers[-1])
        return answers

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """The same for tokens; continuations of one context are the answers to one question."""
        asked = [_Asked((context, continuation), strings[1], tuple(context), True) for strings, context, continuation in requests]
        return [(score.nats, same) for score, same in self._answer(asked, disable_tqdm)]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of each text; one that is longer than the context is cut, each part given the last token before it."""
        self._check_first(requests)
        scores = launch.divide(requests, lambda part: self._score_texts([request.args[0] for request in part], disable_tqdm))
        return [self._record(request, score) for request, score in zip(requests, scores, strict=True)]

    def _answer(self, asked: list[_Asked], disable_tqdm: bool) -> list[tuple[Score, bool]]:
        questions: dict[Hashable, list[int]] = defaultdict(list)
        for row, one in enumerate(asked):
            questions[one.question].append(row)
        parts = [[asked[row] for row in rows] for rows in questions.values()]
        found = launch.divide(parts, lambda part: self._answer_questions(part, disable_tqdm))
        answers: list[Any] = [None] * len(asked)
        for rows, answered in zip(questions.values(), found, strict=True):
            for row, answer in zip(rows, answered, strict=True):
                answers[row] = answer
        return answers

    def _answer_questions(self, questions: list[list[_Asked]], disable_tqdm: bool) -> list[list[tuple[Score, bool]]]:
        with tqdm(total=len(questions), desc="scoring", unit="question", disable=self._hides(disable_tqdm)) as bar:
            scores = self.scorer.score([_answers(question) for question in questions], bar.update)
        same = iter(self._reproduced([one.pair for question in questions for one in question if one.wants_greedy]))
        return [
            [(score, one.wants_greedy and next(same)) for one, score in zip(question, scored, strict=True)]
            for question, scored in zip(questions, scores, strict=True)
        ]

    def _score_texts(self, texts: list[str], disable_tqdm: bool) -> list[Score]:
        windows: list[list[Answer]] = []
        owners: list[int] = []
        for owner, text in enumerate(texts):
            ids = [self.prefix_token_id, *self.tok_encode(text, add_special_tokens=False)]
            width = (self.max_length or max(2, len(ids))) - 1
            starts = range(0, len(ids) - 1, width)
            windows += [[Answer(tuple(ids[start : start + 1]), tuple(ids[start + 1 : start + 1 + width]))] for start in starts]
            owners += [owner] * len(starts)
        with tqdm(total=len(windows), desc="scoring", unit="window", disable=self._hides(disable_tqdm)) as bar:
            scores = self.scorer.score(windows, bar.update)
        totals = [Score(0.0, 0.0, 0)] * len(texts)
        for owner, (score,) in zip(owners, scores, strict=True):
            totals[owner] += score
        return totals

    def _record(self, request: Instance, score: Score) -> float:
        """Keep a score for those who read standard errors; what lm-eval gets is -inf in place of a likelihood that is none."""
        self.scores[request.task_name, request.doc_id, request.idx] = score
        return score.nats if math.isfinite(score.nats) else -math.inf

    def _remember(self, kind: str, arguments: tuple[Any, ...], answer: Any) -> None:
        """Tell lm-eval's cache (`--use_cache`), where it is not one of several, which must not differ."""
        if PartialState().num_processes == 1:
            self.cache_hook.add_partial(kind, arguments, answer)

    @staticmethod
    def _hides(disable_tqdm: bool) -> bool | None:
        return disable_tqdm or not PartialState().is_main_process or None  # None: hidden where no person looks

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
        what = f"a request of {context} tokens with an answer of {answer}"
        self.model.require_room(context + answer, what, "lower num_fewshot or the task's max_gen_toks, or leave the task out")


@register_model("a2d_mdlm")
class MDLM(DiffusionLM):
    """A masked diffusion checkpoint (MDLM) as a model of lm-eval."""

    objective = "mdlm"


@register_model("a2d_bd3lm")
class BD3LM(DiffusionLM):
    """A block diffusion checkpoint (BD3LM) as a model of lm-eval."""

    objective = "bd3lm"


def _listed(until: str | Sequence[str] | None) -> Sequence[str]:
    """The stop strings, which a task may give as one text, or not at all; raises `UserError` for something else."""
    found = [until] if isinstance(until, str) else until or []
    is_texts = isinstance(found, (list, tuple)) and all(isinstance(stop, str) for stop in found)
    require(is_texts, f"generation_kwargs.until={until!r} must be a text, or a list of texts")
    return found


def _effort(generation: sampling.Generation) -> dict[str, float]:
    return {"tokens": len(generation.tokens) + generation.finished, "nfe": generation.nfe, "logprob": generation.logprob}


def _answers(question: list[_Asked]) -> list[Answer]:
    """The answers to a question; they are compared as lm-eval does: as they are, by character (acc_norm) and by byte."""
    is_choice = len({one.text for one in question}) == 1 or len({tuple(one.pair[0]) for one in question}) == 1
    answers = []
    for one in question:
        text = one.text.strip()
        sizes = (1.0, float(len(text) or 1), float(len(text.encode()) or 1)) if is_choice else ()
        answers.append(Answer(tuple(one.pair[0]), tuple(one.pair[1]), sizes))
    return answers


def _summary(scores: Collection[Score]) -> dict[str, Any]:
    """What the likelihoods of a run cost, and how certain they are."""
    errors = [score.stderr for score in scores if math.isfinite(score.stderr)]
    return {
        "requests": len(scores),
        "requests_not_finite": sum(not math.isfinite(score.nats) for score in scores),
        "mean_stderr": statistics.fmean(errors) if errors else None,
        "mean_samples": statistics.fmean(score.samples for score in scores) if scores else None,
    }
