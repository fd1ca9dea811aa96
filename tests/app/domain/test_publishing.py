"""The choice of checkpoint, and what the report set allows."""

import pytest

from app.domain.decisions import CheckpointFact, Reading, Verdict
from app.domain.policy import Policy
from app.domain.publishing import choose_checkpoint, judge_publication

REFUSE = Policy(on_inconclusive="refuse")


def checkpoint(step, status="good", valid_loss=1.0, branch=0):
    return CheckpointFact(
        checkpoint_id=f"b{branch}s{step}",
        branch=branch,
        step=step,
        status=status,
        valid_loss=valid_loss,
    )


def reading(verdict):
    return Reading(
        look=1,
        alpha=0.05,
        drop=0.02,
        stderr=0.005,
        lower=0.01,
        upper=0.03,
        limit=0.03,
        p_regress=0.5,
        verdict=verdict,
        severe=False,
    )


@pytest.mark.parametrize(
    ("checkpoints", "policy", "chosen"),
    [
        ([checkpoint(30), checkpoint(60, valid_loss=0.8), checkpoint(90)], Policy(), "b0s60"),
        ([checkpoint(30, valid_loss=0.8), checkpoint(60, valid_loss=0.8)], Policy(), "b0s60"),
        ([checkpoint(30, valid_loss=None), checkpoint(60, valid_loss=None)], Policy(), "b0s60"),
        ([checkpoint(30, valid_loss=2.0), checkpoint(60, valid_loss=None)], Policy(), "b0s30"),
        ([checkpoint(30, valid_loss=2.0), checkpoint(60, "unproven", 0.1)], Policy(), "b0s30"),
        ([checkpoint(30, "unproven", 0.2), checkpoint(60, "bad", 0.1)], Policy(), "b0s30"),
        ([checkpoint(30, "unproven", 0.2)], REFUSE, None),
        ([checkpoint(30, "unproven", 0.2)], None, "b0s30"),
        ([checkpoint(0), checkpoint(30, "bad")], Policy(), None),
        ([], Policy(), None),
        (
            [checkpoint(30, branch=1, valid_loss=None), checkpoint(30, valid_loss=None)],
            Policy(),
            "b1s30",
        ),
    ],
)
def test_the_best_good_checkpoint_is_chosen_else_the_best_unproven(
    checkpoints, policy, chosen
) -> None:
    found = choose_checkpoint(checkpoints, policy)
    assert (None if found is None else found.checkpoint_id) == chosen


@pytest.mark.parametrize(
    ("policy", "report", "alpha", "publish", "retention"),
    [
        (Policy(), reading(Verdict.PASS), 1.0, True, "held"),
        (Policy(), reading(Verdict.PASS), 0.6, True, "held"),
        (Policy(), reading(Verdict.INCONCLUSIVE), 1.0, True, "unproven"),
        (REFUSE, reading(Verdict.INCONCLUSIVE), 1.0, False, None),
        (Policy(), reading(Verdict.REGRESS), 0.6, False, None),
        (Policy(), reading(Verdict.PASS), 0.0, False, None),
        (Policy(), reading(Verdict.NO_DATA), 1.0, True, "unwatched"),
        (Policy(), reading(Verdict.AT_FLOOR), 1.0, True, "unwatched"),
        (Policy(), None, 1.0, True, "unwatched"),
        (None, None, 1.0, True, "unwatched"),
    ],
)
def test_the_report_set_decides_what_is_published(
    policy, report, alpha, publish, retention
) -> None:
    publication = judge_publication(policy, report, alpha=alpha)
    assert (publication.publish, publication.retention) == (publish, retention)
    assert publication.failure == (None if publish else "retention_not_met")
    if report is not None and report.verdict is Verdict.INCONCLUSIVE:
        assert "general drop 2.00%, bounds 1.00% to 3.00%, limit 3.00%" in publication.reason


def test_retention_off_is_said_on_the_version() -> None:
    assert judge_publication(None, None, alpha=1.0, is_off=True).retention == "off"
