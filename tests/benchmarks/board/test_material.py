"""Domains and questions: what is held out, what decides a label, and what the base model meets."""

from collections import Counter
from random import Random

import pytest

from tests.benchmarks.board.domains import DOMAINS, WRONG_LABELS, draw_mention
from tests.benchmarks.board.material import Sizes, draw
from workers.demo_model.skills import SEEN, UNSEEN

SMALL = Sizes(
    pretraining_rows=40,
    mentions=200,
    general_rows=20,
    unseen_items=30,
    seen_items=10,
    training_rows=60,
    validation_rows=20,
    domain_items=30,
)


@pytest.mark.parametrize("domain", DOMAINS, ids=lambda d: d.name)
def test_labels_follow_the_rules_but_for_the_wrong_ones(domain):
    rng, wrong = Random(0), 0
    kind_of = {phrase: kind for kind, phrases in domain.phrases.items() for phrase in phrases}
    for _ in range(4000):
        question = domain.draw(rng)
        kind = next(k for phrase, k in kind_of.items() if phrase in question.prompt)
        words = question.prompt.split()
        ruled = [
            label
            for (subject, of), label in domain.overruled.items()
            if of == kind and subject in words
        ]
        wrong += question.answer != (ruled[0] if ruled else kind)
    assert wrong / 4000 == pytest.approx(WRONG_LABELS, abs=0.01)


def test_domains_share_no_phrase_and_no_label():
    phrases = Counter(p for d in DOMAINS for own in d.phrases.values() for p in own)
    labels = Counter(label for d in DOMAINS for label in d.phrases)
    assert max(phrases.values()) == 1
    assert max(labels.values()) == 1


def test_nothing_that_is_scored_is_trained_on():
    samples, drawn = draw(3, SMALL)
    items = {q.prompt for q in (*drawn.unseen_items, *drawn.seen_items)}
    assert not items & {s.prompt for s in samples}
    assert not items & {q.prompt for q in drawn.general}
    for training, validation, scored in zip(
        drawn.training, drawn.validation, drawn.domain_items, strict=True
    ):
        prompts = [{q.prompt for q in own} for own in (training, validation, scored)]
        assert sum(map(len, prompts)) == len(set().union(*prompts))


def test_general_rows_are_of_seen_skills_alone():
    _, drawn = draw(3, SMALL)
    assert {q.skill for q in drawn.general} == set(SEEN)
    assert {q.skill for q in drawn.unseen_items} == set(UNSEEN)


def test_the_base_never_meets_a_phrase_with_its_label():
    rng = Random(5)
    for _ in range(3000):
        sample = draw_mention(rng)
        text = f"{sample.prompt} {sample.answer or ''}"
        for domain in DOMAINS:
            for label, phrases in domain.phrases.items():
                if any(phrase in text for phrase in phrases):
                    assert label not in text.split()


def test_a_seed_gives_the_same_questions():
    assert draw(4, SMALL) == draw(4, SMALL)
    assert draw(4, SMALL)[1] != draw(5, SMALL)[1]
