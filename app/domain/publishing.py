"""Which checkpoint is published, and what the report set makes of it."""

from collections.abc import Sequence
from typing import Literal

from app.domain.decisions import CheckpointFact, GainReading, Reading, Verdict
from app.domain.frozen import Frozen
from app.domain.policy import Policy

RetentionWord = Literal["held", "unproven", "unwatched", "off"]


class Publication(Frozen):
    """The end of a job: a version with its word on retention, or the failure that stands in its place."""

    publish: bool
    retention: RetentionWord | None  # None: nothing is published
    reason: str
    failure: Literal["retention_not_met", "no_gain"] | None = None


def choose_checkpoint(
    checkpoints: Sequence[CheckpointFact], policy: Policy | None
) -> CheckpointFact | None:
    """The best good checkpoint, else the best unproven one where the policy lets it be published.

    Best is the lowest validation cross-entropy, where none was measured the latest; step 0 is the base and
    never published.

    Args:
        checkpoints: Those not superseded.
        policy: None where nothing was watched: every checkpoint is unproven and may be published.
    """
    statuses = ["good"]
    if policy is None or policy.on_inconclusive == "publish":
        statuses.append("unproven")
    for status in statuses:
        matching = [c for c in checkpoints if c.status == status and c.step > 0]
        measured = [c for c in matching if c.valid_loss is not None]
        if measured:
            return min(measured, key=lambda c: (c.valid_loss, -c.step, -c.branch))
        if matching:
            return max(matching, key=lambda c: (c.step, c.branch))
    return None


def judge_publication(
    policy: Policy | None, report: Reading | None, *, alpha: float, is_off: bool = False
) -> Publication:
    """What the one test on the report set allows: first of what must hold, then of what must rise.

    Args:
        policy: None where nothing was watched.
        report: Of what would be published, after any shrinking; None where no report set was scored.
        alpha: Its place on the line from base (0) to tuned (1).
        is_off: The job turned retention off.
    """
    held = _judge_hold(policy, report, alpha=alpha, is_off=is_off)
    flat = [] if report is None else [gain for gain in report.gains if not gain.has_risen]
    if policy is None or not held.publish or not flat:
        return held
    told = " ".join(_tell_gain(gain) for gain in flat)
    if policy.on_no_gain == "refuse":
        return Publication(
            publish=False,
            retention=None,
            reason=f"{told} The policy refuses that.",
            failure="no_gain",
        )
    return held.model_copy(update={"reason": f"{held.reason} {told}"})


def _tell_gain(gain: GainReading) -> str:
    if gain.gain is None or gain.lower is None:
        return f"{gain.name} was to rise and could not be measured."
    return (
        f"{gain.name} was to rise and has not shown it: gain {gain.gain:.4f}, lower bound"
        f" {gain.lower:.4f}, asked for more than {gain.min_gain:g}."
    )


def _judge_hold(
    policy: Policy | None, report: Reading | None, *, alpha: float, is_off: bool
) -> Publication:
    if is_off:
        return Publication(publish=True, retention="off", reason="The job turned retention off.")
    if alpha <= 0:
        return Publication(
            publish=False,
            retention=None,
            reason="No point of the line from base to tuned holds and gains anything on the domain.",
            failure="retention_not_met",
        )
    if policy is None or report is None or report.verdict in {Verdict.NO_DATA, Verdict.AT_FLOOR}:
        return Publication(
            publish=True,
            retention="unwatched",
            reason="No benchmark was watched that can say anything.",
        )
    interval = _interval(report)
    if report.verdict is Verdict.REGRESS:
        return Publication(
            publish=False,
            retention=None,
            reason=f"The report set confirms a regression{interval}.",
            failure="retention_not_met",
        )
    if report.verdict is Verdict.PASS:
        return Publication(
            publish=True, retention="held", reason=f"The report set passes{interval}."
        )
    if policy.on_inconclusive == "refuse":
        return Publication(
            publish=False,
            retention=None,
            reason=f"The report set neither passes nor regresses{interval}, and the policy refuses that.",
            failure="retention_not_met",
        )
    return Publication(
        publish=True,
        retention="unproven",
        reason=f"The report set neither passes nor regresses{interval}.",
    )


def _interval(report: Reading) -> str:
    if report.drop is None or report.lower is None or report.upper is None:
        return ""
    return (
        f": general drop {report.drop:.2%}, bounds {report.lower:.2%} to {report.upper:.2%}, "
        f"limit {report.limit:.2%}"
    )
