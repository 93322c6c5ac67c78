"""eval_geneval.py against verdicts, relations, IoUs and summaries of the official code (tests/data/README.md)."""
import hashlib
import json

import pytest
from conftest import DATA, read_lines

from eval_geneval import compute_iou, exact_score, filter_detections, geneval_prompts, relative_position, score, strict_score, summary

CASES = ["", "_extra"]


@pytest.mark.parametrize("which", CASES)
def test_verdicts(which):
    for case in read_lines(f"geneval/scoring_cases{which}.jsonl"):
        kept = filter_detections(case["detections"], case["metadata"]["tag"])
        assert kept == case["expected"]["kept"], case["id"]
        assert score(kept, case["metadata"], case["colors"]) == (case["expected"]["correct"], case["expected"]["reason"]), case["id"]


@pytest.mark.parametrize("which", CASES)
def test_training_rewards(which):
    cases = {case["id"]: case for case in read_lines(f"geneval/scoring_cases{which}.jsonl")}
    for wanted in read_lines(f"geneval/reward_cases{which}.jsonl"):
        case = cases[wanted["id"]]
        kept = filter_detections(case["detections"], case["metadata"]["tag"])
        correct, reason, partial = strict_score(kept, case["metadata"], case["colors"])
        assert (correct, reason) == (wanted["strict_correct"], wanted["strict_reason"]), wanted["id"]
        assert partial == pytest.approx(wanted["score_position_fixed"], abs=1e-9), wanted["id"]


def test_exact_is_strict_and_nothing_else():
    line = {"tag": "counting", "include": [{"class": "cow", "count": 2}], "exclude": [{"class": "cow", "count": 3}]}
    cow = lambda s: [0.0, 0.0, 9.0, 9.0, s]  # noqa: E731
    assert exact_score({"cow": [cow(0.95), cow(0.96)]}, line, {})
    assert not exact_score({"cow": [cow(0.95), cow(0.96)], "dog": [cow(0.4)]}, line, {})     # something else, though faint
    assert not exact_score({"cow": [cow(0.95), cow(0.96), cow(0.5)]}, line, {})              # a third, though faint
    assert not exact_score({"cow": [cow(0.95)]}, line, {})


def test_relations():
    for case in read_lines("geneval/relative_position_cases.jsonl"):
        assert sorted(relative_position(case["a"], case["b"])) == case["expected"], case["id"]


def test_iou():
    for case in read_lines("geneval/iou_cases.jsonl"):
        assert compute_iou(case["a"], case["b"]) == pytest.approx(case["expected"], abs=1e-6), case["id"]


@pytest.mark.parametrize("name", ["full", "one_per_prompt", "three_tags"])
def test_summary(name):
    assert summary(read_lines(f"geneval/summary/{name}_results.jsonl")) == (DATA / f"geneval/summary/{name}_summary.txt").read_text()


def test_the_553_prompts():
    text = "".join(json.dumps(line) + "\n" for line in geneval_prompts())
    assert hashlib.sha256(text.encode()).hexdigest() == "5c48e0813e812e3c373fa5c8ed07a8f0a483be30272b4427b0559c8048e67c13"
    assert len(geneval_prompts(seed=7, n=5)) == 30
