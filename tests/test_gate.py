"""The regression gate: two models are compared question by question."""

import math
import random
import statistics

import pytest

from a2d_core import gate, review


def evaluation(right, name="words/exact_match", **row):
    """results.json of one metric, from its parts: a mapping, or a list for the questions 0, 1, 2..."""
    parts = right if isinstance(right, dict) else {str(i): value for i, value in enumerate(right)}
    values, (task, metric) = list(parts.values()), name.split("/")
    stderr = statistics.stdev(values) / len(values) ** 0.5 if all(map(math.isfinite, values)) else None
    plain = {"task": task, "metric": metric, "value": statistics.fmean(values), "stderr": stderr, "chance": None, "baseline": None}
    return {"tasks": [plain | row], "text": None, "questions": {name: parts}}


def test_models_that_err_on_the_same_questions_are_told_apart_where_independent_errors_would_not():
    champion, candidate = [1.0] * 52 + [0.0] * 48, [1.0] * 48 + [0.0] * 52
    verdict = gate.judge(evaluation(candidate), evaluation(champion))
    assert verdict.word == "failed"
    assert verdict.why.endswith("words/exact_match 0.480 ± 0.050 (champion 0.520 ± 0.050), by 0.040 ± 0.020")
    without = evaluation(champion) | {"questions": {}}  # of an earlier version
    assert gate.judge(evaluation(candidate), without).word == "passed"


def test_one_of_two_equally_good_models_falls_one_time_in_six_and_a_model_never_below_itself():
    draw = random.Random(0)

    def answers(ability):
        return [float(draw.random() < chance) for chance in ability]

    fallen = 0
    for _ in range(600):
        ability = [draw.random() for _ in range(100)]  # hard and easy questions, the same for both
        ours, theirs = evaluation(answers(ability)), evaluation(answers(ability))
        fallen += gate.judge(ours, theirs).word == "failed"
        assert gate.judge(ours, ours).word == "passed"
    assert 0.12 < fallen / 600 < 0.2


@pytest.mark.parametrize("lost", [1, 2])
def test_one_question_lost_in_any_number_is_no_more_than_the_error_and_two_are(lost):
    for count in range(3, 300):
        champion, candidate = [1.0] * count, [1.0] * (count - lost) + [0.0] * lost
        assert gate.judge(evaluation(candidate), evaluation(champion)).word == ("passed" if lost == 1 else "failed"), count


def test_only_the_questions_that_both_answered_count():
    champion = {str(i): float(i < 10 or i % 2) for i in range(100)}
    candidate = {str(i): float(i < 8) for i in range(10)}  # a limit: 0.8 of what the champion answered without an error
    (row,) = gate.compare(evaluation(candidate), evaluation(champion))
    assert (row.word, row.gain.value) == ("worse", pytest.approx(-0.2))
    assert row.candidate.value > row.champion.value


def test_other_questions_leave_the_gate_open():
    other = evaluation({f"5-shot {i}": float(i % 2) for i in range(10)})
    verdict = gate.judge(other, evaluation([1.0, 0.0] * 5))
    assert verdict == gate.Verdict("open", "the champion has words/exact_match, which was asked other questions")


def test_a_number_that_is_none_fails():
    for champion in (None, evaluation([1.0, 0.0])):
        verdict = gate.judge(evaluation([math.nan, 1.0]), champion)
        assert verdict == gate.Verdict("failed", "not a number: words/exact_match")


def test_a_part_of_a_task_is_shown_and_does_not_decide():
    ours, theirs = evaluation([1.0, 0.0, 1.0, 0.0]), evaluation([1.0, 0.0, 1.0, 0.0])
    for results, value in ((ours, 0.1), (theirs, 0.9)):
        results["tasks"].append(evaluation([0.0, 1.0], "sort/exact_match")["tasks"][0] | {"value": value, "stderr": 0.01, "is_main": False})
    assert gate.judge(ours, theirs).word == "passed"
    versions = [review.Version("m", number, {}, {"results": results}) for number, results in ((2, ours), (1, theirs))]
    text = review.text(review.build(*versions))
    assert "gate: passed" in text and "0.900 ± 0.010   worse (-0.800 ± 0.014)" in text
