"""What a generated answer is worth: SQuAD's two by hand and by its own script's rules, BLEU and ROUGE by their libraries."""

import sys

import pytest

from app.domain.benchmarks import GENERATION, SCORER_MODULES, Scorer
from app.errors import TrainingFailed
from workers.evaluation.scorers import (
    exact_match,
    find_scorer,
    normalise_answer,
    normalised_match,
    token_f1,
)


def test_letter_case_and_white_space_do_not_count_and_all_else_does() -> None:
    assert normalise_answer("  The\tBIG \n answer ") == "the big answer"
    assert exact_match("Straße", ["STRASSE"]) == 1.0
    assert exact_match("4.", ["4"]) == 0.0
    assert exact_match("b", ["a", " B"]) == 1.0


@pytest.mark.parametrize(
    ("answer", "accepted", "match", "f1"),
    [
        ("The Eiffel Tower.", ["eiffel tower"], 1.0, 1.0),
        ("an apple a day", ["apple day"], 1.0, 1.0),
        ("anthem", ["them"], 0.0, 0.0),  # an article is a word, no prefix
        ("in Paris", ["Paris"], 0.0, 2 / 3),
        ("Paris, France", ["London", "Paris"], 0.0, 2 / 3),  # the best accepted answer counts
        ("x x y", ["x y y"], 0.0, 2 / 3),  # words are a multiset
        ("", ["x"], 0.0, 0.0),
        ("the", ["a"], 1.0, 1.0),  # nothing is left of either
        ("x", ["the"], 0.0, 0.0),
    ],
)
def test_squads_exact_match_and_f1(answer, accepted, match, f1) -> None:
    assert normalised_match(answer, accepted) == match
    assert token_f1(answer, accepted) == pytest.approx(f1)


@pytest.mark.parametrize("scorer", sorted(GENERATION))
def test_every_score_is_a_share_and_an_accepted_answer_is_worth_one(scorer) -> None:
    if scorer in SCORER_MODULES:
        pytest.importorskip(SCORER_MODULES[scorer][0], reason="an optional library")
    score = find_scorer(scorer)
    texts = [
        "the cat sat on the mat today",
        "eine Katze saß hier auf dem Boden",
        "四十二 是 答案 的 说",
        "",
    ]
    for text in texts:
        for other in texts:
            assert 0.0 <= score(text, [other, "no such thing"]) <= 1.0
        if text:
            assert score(text, ["something else", text]) == pytest.approx(1.0)
    assert score("dog", ["cat"]) < 0.2


def test_bleu_is_sacrebleus_sentence_score() -> None:
    sacrebleu = pytest.importorskip("sacrebleu", reason="an optional library")
    score = find_scorer(Scorer.BLEU4)
    answer, accepted = (
        "the cat is on the mat now",
        ["the cat sat on the mat", "a cat is on the mat"],
    )
    wanted = sacrebleu.sentence_bleu(answer, accepted, use_effective_order=True).score / 100
    assert score(answer, accepted) == pytest.approx(wanted)
    assert 0.3 < wanted < 0.9


def test_rouge_l_is_the_librarys_on_ascii_and_reads_other_scripts_too() -> None:
    scorers = pytest.importorskip("rouge_score.rouge_scorer", reason="an optional library")
    score = find_scorer(Scorer.ROUGE_L)
    answer, accepted = "the cat is on a mat-42", ["A cat sat on the mat 42", "dogs"]
    own = scorers.RougeScorer(["rougeL"], use_stemmer=False)
    assert score(answer, accepted) == pytest.approx(
        own.score_multi(accepted, answer)["rougeL"].fmeasure
    )
    assert score("кошка сидит", ["кошка спит"]) == pytest.approx(0.5)


@pytest.mark.parametrize("scorer", sorted(SCORER_MODULES))
def test_a_missing_library_fails_the_run_with_its_name(scorer, monkeypatch) -> None:
    module, package = SCORER_MODULES[scorer]
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(TrainingFailed, match=package) as error:
        find_scorer(scorer)
    assert (error.value.code, error.value.param) == ("scorer_not_available", "scorer")
