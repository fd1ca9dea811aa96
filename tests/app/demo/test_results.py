"""The demo's claims: each one can fail."""

import pytest
from rich.console import Console

from app.demo.results import (
    GROUPS,
    SCORERS,
    Change,
    Outcome,
    broken_claims,
    build_table,
    describe_decision,
)

ROLL_BACK = {
    "step": 15,
    "branch": 0,
    "action": "roll_back",
    "reason": "It fell.",
    "before": {"strengths": {"ewc": 1.0}},
    "after": {"strengths": {"ewc": 10.0}},
}


def _outcome(title, *, after, domain=1.0, retention="held", decisions=(ROLL_BACK,), items=1050):
    verdict = {"drop": 0.01, "lower": 0.005, "upper": 0.015, "verdict": "pass"}
    job = {
        "status": "succeeded",
        "started_at": 100,
        "finished_at": 142,
        "report": {"retention": retention, "verdict": verdict},
        "retention": {"strategies": [{"type": "ewc"}]},
    }
    changes = {
        (scorer, group): Change(0.98, 0.98 * after, items) for scorer in SCORERS for group in GROUPS
    }
    return Outcome(title, job, changes, dict.fromkeys(SCORERS, domain), list(decisions))


PLAIN = _outcome("plain", after=0.5, decisions=())


def test_nothing_is_broken_when_plain_forgets_and_the_controlled_job_holds():
    assert broken_claims(PLAIN, _outcome("controlled", after=0.98)) == []


@pytest.mark.parametrize(
    ("plain", "controlled", "wanted"),
    [
        (_outcome("plain", after=0.98), {"after": 0.99}, "plain fine-tuning lost only 2.0%"),
        (PLAIN, {"after": 0.96}, "lost 4.0% by EM on unseen skills"),
        (PLAIN, {"after": 0.96}, "lost 4.0% by MC on unseen skills"),
        (PLAIN, {"after": 0.99, "domain": 0.94}, "94.0% on the domain"),
        (PLAIN, {"after": 0.99, "items": 999}, "only 999 unseen items"),
        (PLAIN, {"after": 0.99, "decisions": ()}, "never rolled back"),
        (PLAIN, {"after": 0.99, "retention": "unproven"}, "ended unproven, not held"),
    ],
)
def test_a_claim_that_does_not_hold_is_named(plain, controlled, wanted):
    broken = broken_claims(plain, _outcome("controlled", **controlled))
    assert any(wanted in claim for claim in broken)


def test_no_measurement_is_no_success():
    empty = _outcome("plain", after=0.5)
    for key in empty.changes:
        empty.changes[key] = Change(0.0, 0.0, 0)
    assert broken_claims(empty, _outcome("controlled", after=0.99))


def test_the_table_shows_every_number():
    console = Console(width=160, record=True, file=None, force_terminal=False)
    with console.capture() as capture:
        console.print(build_table([PLAIN, _outcome("controlled", after=0.99)]))
    text = capture.get()
    for wanted in ("98.0% -> 49.0%", "98.0% -> 97.0%", "1.0% [0.5%, 1.5%]", "1 roll_back", "42"):
        assert wanted in text


def test_a_decision_is_a_line_with_what_changed():
    line = describe_decision(ROLL_BACK)
    assert "roll_back" in line
    assert "ewc 1 -> 10" in line
    assert line.endswith("It fell.")
