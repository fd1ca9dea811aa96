"""The end of a run: the report test, shrinking where it failed, the frontier, and the artifact."""

import csv
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import nn

from app.domain.benchmarks import BenchmarkKind, BenchmarkScores
from app.domain.decisions import Verdict
from app.domain.estimates_calibration import Measured
from app.domain.messages import DecisionReply, Finished, FrontierPoint, PublishTarget
from app.domain.sensing import holds, read_report
from app.domain.spec import ResolvedStudent
from workers.export.interpolate import Interpolation
from workers.training.checkpoints import load_checkpoint
from workers.training.exporting import artifact_kind, needs_merging, write_artifact
from workers.training.merging import merge_into_whole, report_values
from workers.training.preferences import CHOSEN, REJECTED
from workers.training.session import Session
from workers.training.shifting import report_shift
from workers.training.student import distil_student
from workers.training.suite import FRONTIER_ITEMS, FRONTIER_POINTS, Marks
from workers.training.tasks import store_name


@dataclass(frozen=True, slots=True)
class Point:
    """What one point of the line from base to tuned measures."""

    alpha: float
    domain: float | None
    valid_loss: float | None


def finish(session: Session, reply: DecisionReply) -> None:
    """Publishes what the last decision named, or says why nothing can be published."""
    run, talk, target = session.run, session.talk, reply.publish
    result_csv = session.scratch / "result.csv"
    if run.ranks.is_speaker:
        write_result(session, result_csv)
    outcome = Outcome() if target is None else _publish(session, target)
    if target is None:
        outcome.failure = reply.failure
    session.stop_clock()
    talk.ask(
        Finished(
            id=talk.next_id(),
            checkpoint_id="" if target is None else target.checkpoint_id,
            artifact_directory=outcome.artifact_directory,
            artifact_kind=artifact_kind(session.plan),
            alpha=outcome.alpha,
            report=outcome.report,
            tuned_report=outcome.tuned_report,
            valid_loss=outcome.valid_loss,
            frontier=outcome.frontier,
            result_csv=str(result_csv),
            trained_tokens=run.trained_tokens,
            seconds={name: round(seconds, 3) for name, seconds in session.seconds.items()},
            failure=outcome.failure,
            measured=_measured(session),
            merged_baseline=outcome.merged_baseline,
        )
    )


def _measured(session: Session) -> Measured | None:
    run = session.run
    names = [store_name(0)] if run.preferences is None else [CHOSEN, REJECTED]
    lengths = [float(run.stores[name].lengths.mean()) for name in names]
    return run.workload.measured(
        run.ctx.device,
        world_size=run.ranks.world_size,
        mean_row_tokens=sum(lengths) / len(lengths),
    )


@dataclass
class Outcome:
    """What is said of the published weights."""

    artifact_directory: str | None = None
    alpha: float = 1.0
    report: tuple[BenchmarkScores, ...] = ()
    tuned_report: tuple[BenchmarkScores, ...] = ()
    valid_loss: float | None = None
    frontier: tuple[FrontierPoint, ...] = ()
    failure: Literal["retention_not_met"] | None = None
    merged_baseline: tuple[BenchmarkScores, ...] = ()


def _publish(session: Session, target: PublishTarget) -> Outcome:
    run, suite, policy = session.run, session.suite, session.plan.policy
    load_checkpoint(run, Path(target.checkpoint_directory), keep_carry=True)
    for strategy in run.strategies:
        strategy.on_task_end(run.ctx)
    for strategy in run.strategies:
        strategy.on_publish(run.ctx)
    session.enter("evaluating")
    marks = suite.measure("report")
    outcome = Outcome(tuned_report=suite.packed(marks, "report"))
    outcome.report = outcome.tuned_report
    has_regressed = policy is not None and (
        read_report(policy, suite.sensed(marks, "report")).verdict is Verdict.REGRESS
    )
    line = session.line()
    session.enter("frontier")
    outcome.frontier = measure_frontier(session, line)
    if has_regressed:
        _shrink(session, line, outcome)
    elif session.plan.merge_back:
        _merge_back(session, line, outcome)
    line.set(outcome.alpha)
    outcome.valid_loss = _finite(session.validate()[0])
    report_shift(session, line, outcome.alpha)
    session.enter("exporting")
    merged = _merge(session, outcome) if needs_merging(session.plan) else None
    outcome.artifact_directory = save_published(session, outcome.alpha, merged)
    if session.plan.student is not None and outcome.failure is None:
        _distil(session, session.plan.student, outcome)
    return outcome


def measure_frontier(session: Session, line: Interpolation) -> tuple[FrontierPoint, ...]:
    """General and domain values at 11 points of the line, on gate items; empty where nothing is watched."""
    suite = session.suite
    points = []
    for k in range(FRONTIER_POINTS):
        alpha = k / (FRONTIER_POINTS - 1)
        line.set(alpha)
        marks = suite.measure("gate", at_most=FRONTIER_ITEMS)
        valid_loss = _finite(session.validate()[0])
        if not marks and valid_loss is None:
            return ()
        points.append(_frontier_point(session, alpha, marks, valid_loss))
        session.report()
    return tuple(points)


def _frontier_point(
    session: Session, alpha: float, marks: Marks, valid_loss: float | None
) -> FrontierPoint:
    suite = session.suite
    return FrontierPoint(
        alpha=alpha,
        general=suite.mean(marks, BenchmarkKind.GENERAL, "gate", at_most=FRONTIER_ITEMS),
        domain=suite.mean(marks, BenchmarkKind.DOMAIN, "gate", at_most=FRONTIER_ITEMS),
        valid_loss=valid_loss,
        benchmarks={
            watched.plan.name: _finite(
                watched.value(
                    marks[watched.plan.benchmark_version_id],
                    suite.indices(watched, "gate", at_most=FRONTIER_ITEMS),
                )
            )
            for watched in suite.benchmarks
        },
    )


def _shrink(session: Session, line: Interpolation, outcome: Outcome) -> None:
    """Takes the point nearest to the tuned weights that holds on gate items, and tests it once on the report set."""
    suite, policy = session.suite, session.plan.policy
    outcome.alpha = 0.0
    for point in sorted(outcome.frontier, key=lambda p: -p.alpha):
        if policy is None or not 0.0 < point.alpha < 1.0:
            continue
        line.set(point.alpha)
        if holds(policy, suite.sensed(suite.measure("gate"), "gate")):
            outcome.alpha = point.alpha
            break
    line.set(outcome.alpha)
    marks = suite.measure("report")
    outcome.report = suite.packed(marks, "report")
    still_regresses = policy is not None and (
        read_report(policy, suite.sensed(marks, "report")).verdict is Verdict.REGRESS
    )
    if still_regresses or not gains(outcome.frontier, outcome.alpha):
        outcome.failure = "retention_not_met"


def _merge_back(session: Session, line: Interpolation, outcome: Outcome) -> None:
    """Goes back toward the base by the share that the job asks for, or to the best point of the line."""
    asked = session.plan.merge_back
    if asked == "search":
        outcome.alpha = best_point(outcome.frontier)
    elif asked is not None:
        outcome.alpha = 1.0 - asked
    if outcome.alpha < 1.0:
        line.set(outcome.alpha)
        outcome.report = session.suite.packed(session.suite.measure("report"), "report")
    session.talk.note(
        "info",
        "merged_back",
        f"The published weights lie at {outcome.alpha:g} of the line from base to tuned.",
        alpha=outcome.alpha,
        asked=asked,
    )


def best_point(frontier: tuple[FrontierPoint, ...]) -> float:
    """The point where general and domain ability together keep most of what the two ends have.

    General ability counts as its share of the base's, the domain as the share gained of what the tuned
    weights gain over the base, by validation cross-entropy or else by the domain benchmarks (Wortsman 2021
    chooses alpha on validation items of both). 1 where either was not measured.
    """
    ends = {point.alpha: point for point in frontier}
    base, tuned = ends.get(0.0), ends.get(1.0)
    if base is None or tuned is None or not base.general:
        return 1.0

    def gained(point: FrontierPoint) -> float | None:
        values = [
            (p.valid_loss if base.valid_loss is not None else p.domain)
            for p in (base, point, tuned)
        ]
        first, here, last = values
        if first is None or here is None or last is None or first == last:
            return None
        return (first - here) / (first - last)

    scores = {
        point.alpha: point.general / base.general + share
        for point in frontier
        if point.alpha > 0 and point.general is not None and (share := gained(point)) is not None
    }
    return max(scores, key=lambda alpha: (scores[alpha], alpha), default=1.0)


def _distil(session: Session, config: ResolvedStudent, outcome: Outcome) -> None:
    """A student that holds takes the tuned model's place."""
    if outcome.artifact_directory is None:
        return
    student = distil_student(session, config, Path(outcome.artifact_directory))
    if student is not None:
        outcome.artifact_directory = student.directory
        outcome.report = student.suite.packed(student.marks, "report")
        outcome.valid_loss = _finite(student.valid_loss)


def gains(frontier: tuple[FrontierPoint, ...], alpha: float) -> bool:
    """Whether a point is better than the base on validation cross-entropy or on the domain benchmarks."""
    if alpha == 0.0:
        return False
    base = next(p for p in frontier if p.alpha == 0.0)
    point = min(frontier, key=lambda p: abs(p.alpha - alpha))
    measured = []
    if base.valid_loss is not None and point.valid_loss is not None:
        measured.append(point.valid_loss < base.valid_loss)
    if base.domain is not None and point.domain is not None:
        measured.append(point.domain > base.domain)
    return any(measured) or not measured  # without either nothing speaks against it


def write_result(session: Session, path: Path) -> None:
    """The accepted steps' metrics as CSV, with OpenAI's column names."""
    names = sorted({name for row in session.run.history for name in row.values})
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["step", "train_loss", "train_accuracy", "learning_rate", "tokens", *names])
        for row in session.run.history:
            numbers = [row.train_loss, row.train_mean_token_accuracy, row.learning_rate, row.tokens]
            writer.writerow([row.step, *numbers, *(row.values.get(name) for name in names)])


def _merge(session: Session, outcome: Outcome) -> nn.Module:
    """Whole weights from a quantised run: measured again, and judged by what they measure."""
    suite, run = session.suite, session.run
    merged = merge_into_whole(session.plan, run.model, suite, session.tokenizer, run.ranks)
    session.talk.note(
        "info",
        "merged_into_whole",
        f"The adapters were trained on a base in {session.plan.base.quantization} and are published in the"
        " whole one, so the report set was measured again there.",
        quantized=report_values(suite, outcome.report),
        merged=report_values(suite, merged.report),
        whole_base=report_values(suite, merged.baseline),
    )
    outcome.report, outcome.merged_baseline = merged.report, merged.baseline
    return merged.model


def save_published(session: Session, alpha: float, merged: nn.Module | None = None) -> str:
    """Writes the artifact of the weights as they stand, or of what they were merged into; its directory."""
    run, plan = session.run, session.plan
    model = run.model if merged is None else merged
    for strategy in run.strategies:
        model = strategy.export(run.ctx, model)
    directory = session.scratch / f"artifact-a{plan.attempt}"

    def extras(partial: Path) -> None:
        for strategy in run.strategies:
            strategy.export_files(run.ctx, partial)

    if run.ranks.is_speaker:
        write_artifact(plan, model, session.tokenizer, directory, alpha=alpha, extras=extras)
    return str(directory)


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
