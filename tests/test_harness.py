"""The classes that lm-evaluation-harness runs a diffusion checkpoint through."""

import json
import math
import subprocess
import sys

import families
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.tasks._index import TaskIndex

from a2d_core import likelihood, models, sampling, tasks
from a2d_core.__main__ import main
from a2d_core.config import SampleConfig, UserError
from a2d_core.harness import DiffusionLM

CONTEXT = 64


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """The directory of a tiny autoregressive model with random weights, large enough to prefer some tokens to others."""
    return families.save_source(tmp_path_factory.mktemp("source"), layers=2, max_position_embeddings=CONTEXT, initializer_range=0.2)


@pytest.fixture(scope="module")
def checkpoints(source, tmp_path_factory):
    return families.convert_both(source, tmp_path_factory.mktemp("converted"))


@pytest.fixture(params=["mdlm", "bd3lm"])
def model(request, checkpoints):
    return models.load(checkpoints[request.param])


@pytest.fixture
def uniform(model):
    """A model to which all tokens are alike."""
    with torch.no_grad():
        model.network.get_output_embeddings().weight.zero_()
    return model


def requests(kind, *arguments):
    return [Instance(kind, {}, a, i) for i, a in enumerate(arguments)]


def greedy(model, prompt, count):
    return sampling.generate(model, [model.tokenizer(prompt)["input_ids"]], SampleConfig(max_new_tokens=count))[0].tokens


SHORT = {"max_gen_toks": 4}
PROMPTS = ["Reverse: planet", "Sort: ab", "Upper: seven", "Last: x", "a longer prompt than the others"]


# --- generation ---


def test_the_harness_generates_what_the_sampler_does(model):
    config = SampleConfig(max_new_tokens=12, batch_size=2)
    prompts = [model.tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    expected = [model.tokenizer.decode(g.tokens, skip_special_tokens=True) for g in sampling.generate(model, prompts, config)]
    assert len(set(expected)) > 1
    assert DiffusionLM(model, sample=config).generate_until(requests("generate_until", *((p, {}) for p in PROMPTS))) == expected


def test_drawn_text_repeats_by_seed_and_equals_that_of_the_sampler(model):
    config = SampleConfig(max_new_tokens=8, temperature=0.7, batch_size=2)
    asked = requests("generate_until", *((p, {"do_sample": True, "temperature": 0.7}) for p in PROMPTS))
    prompts = [model.tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    generations = sampling.generate(model, prompts, config, generator=torch.Generator().manual_seed(3))
    first = DiffusionLM(model, max_new_tokens=8, batch_size=2, seed=3).generate_until(asked)
    assert first == [model.tokenizer.decode(g.tokens, skip_special_tokens=True) for g in generations]
    assert first == DiffusionLM(model, max_new_tokens=8, batch_size=2, seed=3).generate_until(asked)
    assert first != DiffusionLM(model, max_new_tokens=8, batch_size=2, seed=4).generate_until(asked)


def test_requests_of_different_lengths_are_answered_each_at_its_own(model):
    lm = DiffusionLM(model, max_new_tokens=5)
    lengths = [3, 9, 3, None, 9]
    asked = [(p, {} if n is None else {"max_gen_toks": n}) for p, n in zip(PROMPTS, lengths, strict=True)]
    expected = [model.tokenizer.decode(greedy(model, p, n or 5), skip_special_tokens=True) for p, n in zip(PROMPTS, lengths, strict=True)]
    assert lm.generate_until(requests("generate_until", *asked)) == expected


def test_an_answer_is_cut_before_the_first_stop_string(model):
    tokens = greedy(model, PROMPTS[0], 24)
    text = model.tokenizer.decode(tokens, skip_special_tokens=True)
    early, late = text[2:4], text[5:7]
    lm = DiffusionLM(model)
    whole, cut, single, absent = lm.generate_until(
        requests(
            "generate_until",
            (PROMPTS[0], {"max_gen_toks": 24}),
            (PROMPTS[0], {"max_gen_toks": 24, "until": [late, early, ""]}),
            (PROMPTS[0], {"max_gen_toks": 24, "until": late}),
            (PROMPTS[0], {"max_gen_toks": 24, "until": ["no such text"]}),
        )
    )
    assert whole == absent == text
    assert cut == text.split(early)[0].split(late)[0]
    assert single == text.split(late)[0]


def test_a_special_token_stops_an_answer_though_its_text_is_not_shown(model):
    lm = DiffusionLM(model)
    user = model.tokenizer.convert_tokens_to_ids("<|user|>")
    tokens = [*model.tokenizer("ab")["input_ids"], user, *model.tokenizer("cd")["input_ids"]]
    assert lm._cut(tokens, "abcd", ["<|user|>"]) == "ab"
    assert lm._cut(tokens, "abcd", []) == "abcd"


@pytest.mark.parametrize(
    ("arguments", "temperature"),
    [
        ({}, 0.3),
        ({"do_sample": False}, 0.0),
        ({"do_sample": False, "temperature": 0.9}, 0.0),
        ({"do_sample": True}, 0.3),
        ({"temperature": 0.8, "do_sample": True}, 0.8),
        ({"temperature": 0}, 0.0),
    ],
)
def test_a_task_decides_on_the_temperature_and_the_model_on_what_it_leaves_open(model, arguments, temperature):
    assert DiffusionLM(model, temperature=0.3).sampler_for(arguments).temperature == temperature


def test_do_sample_without_a_temperature_draws_at_one(model):
    assert DiffusionLM(model).sampler_for({"do_sample": True}).temperature == 1.0


def test_an_unknown_generation_argument_is_refused_by_name(model):
    with pytest.raises(UserError, match=r"unknown generation argument 'num_beams'.*max_gen_toks"):
        DiffusionLM(model).generate_until(requests("generate_until", (PROMPTS[0], {"num_beams": 4})))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": "warm"}, "generation_kwargs.temperature='warm' must be of type float"),
        ({"temperature": -1.0}, "temperature must be at least 0"),
        ({"top_p": 0}, r"top_p must lie in \(0, 1\]"),
        ({"max_gen_toks": 2.5}, "max_new_tokens=2.5 must be of type int"),
        ({"until": 5}, "until=5 must be a text, or a list of texts"),
        ({"until": ["a", 5]}, "must be a text, or a list"),
    ],
)
def test_a_generation_argument_that_means_nothing_is_refused_before_any_work(model, arguments, message, no_forward):
    with pytest.raises(UserError, match=message):
        DiffusionLM(model).generate_until(requests("generate_until", (PROMPTS[0], SHORT), (PROMPTS[0], SHORT | arguments)))


def test_a_task_may_narrow_what_is_drawn_from(model):
    sampler = DiffusionLM(model, top_k=9).sampler_for({"do_sample": True, "top_p": 0.5, "top_k": 4})
    assert (sampler.top_p, sampler.top_k) == (0.5, 4)


def test_one_beam_is_what_there_is(model):
    assert DiffusionLM(model).sampler_for({"num_beams": 1}) == DiffusionLM(model).sampler_for({})


def test_a_request_beyond_the_context_is_refused_before_any_work(model, monkeypatch):
    monkeypatch.setattr(model, "hidden", None)
    lm = DiffusionLM(model)
    with pytest.raises(UserError, match=f"context is {CONTEXT}"):
        lm.generate_until(requests("generate_until", (PROMPTS[0], {"max_gen_toks": 4}), (PROMPTS[0], {"max_gen_toks": CONTEXT})))
    with pytest.raises(UserError, match=f"context is {CONTEXT}"):
        lm.loglikelihood(requests("loglikelihood", ("a", "b"), ("a" * CONTEXT, "b")))


# --- likelihood ---


def test_a_uniform_model_scores_the_log_of_the_number_of_allowed_tokens(uniform):
    allowed = uniform.network.get_input_embeddings().weight.shape[0] - 1
    lm = DiffusionLM(uniform, nelbo_samples=3)
    asked = [("Reverse: planet", " tenalp"), ("", "seven"), ("a", "b")]
    scores = [score for score, _ in lm.loglikelihood(requests("loglikelihood", *asked))]
    assert scores == pytest.approx([-len(answer) * math.log(allowed) for _, answer in asked], rel=1e-5)


def test_a_text_longer_than_the_context_is_scored_in_parts_each_token_once(uniform):
    allowed = uniform.network.get_input_embeddings().weight.shape[0] - 1
    texts = ["x" * 10, "y" * (CONTEXT - 1), "z" * (3 * CONTEXT + 5), ""]
    scores = DiffusionLM(uniform, nelbo_samples=2).loglikelihood_rolling(requests("loglikelihood_rolling", *((t,) for t in texts)))
    assert scores == pytest.approx([-len(text) * math.log(allowed) for text in texts], rel=1e-5)


def test_a_score_depends_on_neither_batch_size_nor_order(model):
    asked = [(p, a) for p in PROMPTS for a in ("yes", " no, not at all", "maybe")]
    one = DiffusionLM(model, batch_size=1).loglikelihood(requests("loglikelihood", *asked))
    many = DiffusionLM(model, batch_size=7).loglikelihood(requests("loglikelihood", *asked[::-1]))[::-1]
    assert [score for score, _ in one] == pytest.approx([score for score, _ in many], rel=1e-4)
    assert [same for _, same in one] == [same for _, same in many]
    other_seed = DiffusionLM(model, seed=1).loglikelihood(requests("loglikelihood", *asked))
    assert [score for score, _ in one] != pytest.approx([score for score, _ in other_seed], rel=1e-4)


def test_the_choices_of_a_question_share_their_noise_and_questions_do_not(model, monkeypatch):
    rows = {}
    whole = likelihood.nelbo

    def spy(model, streams, *, rows_B, **options):
        valid = streams.noised.valid.expand(len(rows_B), -1)
        texts = [model.tokenizer.decode(ids[kept]) for ids, kept in zip(streams.noised_ids_BT, valid, strict=True)]
        rows.update(zip(texts, rows_B.tolist(), strict=True))
        return whole(model, streams, rows_B=rows_B, **options)

    monkeypatch.setattr(likelihood, "nelbo", spy)
    DiffusionLM(model).loglikelihood(requests("loglikelihood", ("one", "ab"), ("one", "cd"), ("two", "ab")))
    assert rows["oneab"] == rows["onecd"] != rows["twoab"]


def test_a_continuation_is_greedy_where_the_sampler_writes_it(model):
    lm, context = DiffusionLM(model), model.tokenizer(PROMPTS[0])["input_ids"]
    written = greedy(model, PROMPTS[0], 6)
    assert len(written) == 6
    changed = [*written[:3], (written[3] + 1) % 256, *written[4:]]
    answers = lm._loglikelihood_tokens([(("", ""), context, tokens) for tokens in (written, changed, written[:2] + changed[:1])])
    assert [same for _, same in answers] == [True, False, greedy(model, PROMPTS[0], 3) == written[:2] + changed[:1]]


def test_spaces_at_the_end_of_a_context_stay_where_no_token_spans_them(model):
    lm = DiffusionLM(model)
    context, continuation = lm._encode_pair("Answer: ", "yes")
    assert model.tokenizer.decode(context) == "Answer: "
    assert model.tokenizer.decode(continuation) == "yes"


def test_standard_errors_are_kept_by_task_document_and_place(model):
    asked = [Instance("loglikelihood", {}, ("one", text), i, metadata=("letters", 7, 1)) for i, text in enumerate(("two", "a longer one"))]
    lm = DiffusionLM(model, max_nelbo_samples=8)
    answers = lm.loglikelihood(asked)
    assert set(lm.scores) == {("letters", 7, 0), ("letters", 7, 1)}
    assert [lm.scores["letters", 7, i].nats for i in (0, 1)] == [score for score, _ in answers]
    assert lm.scores["letters", 7, 0].stderr == 0 < lm.scores["letters", 7, 1].stderr  # three bytes have seven masks, all of them summed
    text = [Instance("loglikelihood_rolling", {}, ("x" * 3 * CONTEXT,), 0, metadata=("text", 0, 1))]
    assert lm.loglikelihood_rolling(text) == [lm.scores["text", 0, 0].nats] and lm.scores["text", 0, 0].stderr > 0
    told = lm.get_model_info()["likelihood"]
    assert (told["requests"], told["requests_not_finite"], told["method"]) == (3, 0, "nelbo") and told["mean_stderr"] > 0


def test_a_likelihood_that_is_not_finite_is_the_worst_there_is_and_counted(model):
    with torch.no_grad():
        model.network.get_output_embeddings().weight[ord("z")] = torch.nan
    lm = DiffusionLM(model, nelbo_samples=2)
    lm._reproduced = lambda pairs: [False] * len(pairs)
    assert lm.loglikelihood(requests("loglikelihood", ("one", "ab"), ("one", "cd"))) == [(-math.inf, False)] * 2
    assert lm.get_model_info()["likelihood"]["requests_not_finite"] == 2


# --- construction ---


def test_the_command_of_lm_eval_runs_the_model(checkpoints, tmp_path, monkeypatch):
    """Without lm-eval's own 14,000 task files, which take many seconds to read."""
    (tmp_path / "rows.json").write_text(json.dumps([{"question": f"Q{i}", "choices": ["no", "yes"], "answer": i % 2} for i in range(2)]))
    task = {"task": "yes_or_no", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.json")}}}
    task |= {"output_type": "multiple_choice", "test_split": "test", "doc_to_text": "{{question}}", "doc_to_choice": "{{choices}}"}
    (tmp_path / "task.yaml").write_text(json.dumps(task | {"doc_to_target": "{{answer}}", "metric_list": [{"metric": "acc"}]}))
    build = TaskIndex.build
    monkeypatch.setattr(TaskIndex, "build", staticmethod(lambda paths: build([path for path in paths if path == tmp_path])))
    options = ["--model", "a2d_bd3lm", "--model_args", f"pretrained={checkpoints['bd3lm']},likelihood=exact", "--tasks", "yes_or_no"]
    where = ["--include_path", str(tmp_path), "--batch_size", "2", "--output_path", str(tmp_path / "out"), "--log_samples"]
    assert main(["lm-eval", *options, *where]) == 0
    (path,) = (tmp_path / "out").rglob("results_*.json")
    results = json.loads(path.read_text())
    assert results["results"]["yes_or_no"]["acc,none"] in (0, 0.5, 1)
    assert results["config"]["sampler"]["batch_size"] == 2 and results["config"]["likelihood"]["method"] == "exact"


def test_a_task_file_makes_the_models_known_to_the_plain_command():
    program = f"""
from lm_eval.api.registry import model_registry
from lm_eval.tasks._yaml_loader import load_yaml
assert "a2d_mdlm" not in model_registry
load_yaml({str(tasks.HERE / "plugin.yaml")!r})
assert {{"a2d_mdlm", "a2d_bd3lm"}} <= set(model_registry)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=tasks.HERE.parents[1], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("given", "size"), [("auto", 32), ("7", 7), (5, 5)])
def test_the_batch_size_may_be_what_the_command_of_lm_eval_passes(model, given, size):
    assert DiffusionLM(model, batch_size=given).sample.batch_size == size


def test_a_batch_size_that_is_none_is_refused(model):
    with pytest.raises(UserError, match="batch_size='many' must be of type int"):
        DiffusionLM(model, batch_size="many")


def test_lm_eval_finds_the_classes_by_name_and_passes_settings_on(checkpoints):
    for objective, directory in checkpoints.items():
        text = f"pretrained={directory},threshold=0.5,max_new_tokens=9,nelbo_samples=2,seed=7"
        lm = get_model(f"a2d_{objective}").create_from_arg_string(text, {"batch_size": 3, "device": None})
        assert (lm.sample.threshold, lm.sample.max_new_tokens, lm.sample.batch_size) == (0.5, 9, 3)
        assert (lm.scorer.samples, lm.seed, lm.max_length) == (2, 7, CONTEXT)


def test_a_checkpoint_of_the_other_objective_is_refused(checkpoints):
    with pytest.raises(UserError, match="is a checkpoint for mdlm, not for bd3lm: ask for mdlm"):
        get_model("a2d_bd3lm")(pretrained=checkpoints["mdlm"])


def test_an_autoregressive_checkpoint_is_refused(source):
    with pytest.raises(UserError, match="is not a diffusion checkpoint"):
        get_model("a2d_mdlm")(pretrained=source)


@pytest.mark.parametrize(
    ("setting", "message"), [("treshold", "did you mean 'threshold'"), ("prompts", "the tasks bring their own prompts")]
)
def test_a_setting_that_means_nothing_here_is_refused(model, setting, message):
    with pytest.raises(UserError, match=message):
        DiffusionLM(model, **{setting: 0.5})


def test_the_chat_template_is_the_tokenizers(model):
    lm, messages = DiffusionLM(model), [{"role": "user", "content": "Sort: cab"}]
    assert lm.apply_chat_template(messages) == "<|user|>Sort: cab<|end|><|assistant|>"
    assert lm.apply_chat_template([*messages, {"role": "assistant", "content": "a"}], add_generation_prompt=False).endswith(
        "<|assistant|>a"
    )
    assert lm.chat_template(True) == model.tokenizer.chat_template
    model.tokenizer.chat_template = None
    with pytest.raises(UserError, match="has no chat template"):
        lm.apply_chat_template(messages)
