"""What a job is watched by: the benchmarks it names or its base's suite, and what its project requires."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal
from uuid import UUID

from sqlalchemy.orm import Session

from app.db.models import BaseModel, Project, RequiredBenchmark
from app.db.repositories.benchmarks import (
    BenchmarkRepository,
    NamedVersion,
    RequiredVersion,
    SuiteBenchmark,
)
from app.domain.benchmarks import BenchmarkKind, BenchmarkScores, Scorer
from app.domain.policy import VALID_LOSS, EarlyStopping, Policy, WatchedBenchmark
from app.domain.runplan import BenchmarkPlan
from app.domain.stopping import find_metric
from app.errors import BadRequest, NotFound

DEFAULTS: Final = Policy()


@dataclass(frozen=True, slots=True)
class Watched:
    """A benchmark version that a job watches."""

    benchmark: NamedVersion
    weight: float
    max_drop: float | None
    expect: Literal["hold", "rise"] = "hold"
    min_gain: float | None = None
    required_limit: float | None = None  # of the project; None: it does not require this one

    @property
    def is_general(self) -> bool:
        """Whether it must not drop."""
        return self.benchmark.version.kind is BenchmarkKind.GENERAL

    @property
    def pinned(self) -> WatchedBenchmark:
        """As it stands in the job's policy, its version pinned."""
        return WatchedBenchmark(
            name=self.benchmark.reference,
            weight=self.weight,
            max_drop=self.max_drop,
            expect=self.expect,
            min_gain=self.min_gain,
        )


def plan_benchmark(
    named: NamedVersion,
    *,
    weight: float,
    max_drop: float | None,
    path: str = "",
    baseline: BenchmarkScores | None = None,
) -> BenchmarkPlan:
    """A benchmark version as a look takes it; without a path where whoever scores it has the items."""
    version = named.version
    return BenchmarkPlan(
        benchmark_version_id=str(version.id),
        name=named.reference,
        kind=version.kind,
        scorer=version.scorer,
        weight=weight,
        max_drop=max_drop,
        path=path,
        sha256=version.items_sha256,
        baseline_scores=None if baseline is None else baseline.scores,
        baseline_tokens=None if baseline is None else baseline.tokens,
    )


def resolve_watched(
    session: Session,
    project_id: UUID,
    base: BaseModel | None,
    wanted: Sequence[WatchedBenchmark] | None,
    *,
    is_off: bool = False,
) -> tuple[Watched, ...]:
    """What a job on this base watches: the benchmarks it names, else the base's suite.

    The suite's mandatory ones and those that the project requires are there whatever the job says; a required
    one keeps at least its weight and at most its limit.

    Args:
        session: The caller's transaction.
        project_id: Whose job it is.
        base: The model it starts from; None: one that is not registered here, so without a suite.
        wanted: As the job's policy names them; None: it names none.
        is_off: The job turned retention off.

    Raises:
        NotFound: No benchmark has a name that was given.
        BadRequest: A benchmark is named twice.
    """
    repository = BenchmarkRepository(session)
    suite = [] if base is None else repository.list_suite(base.id)
    if is_off:
        watched = []
    elif wanted is None:
        watched = [_of_suite(entry) for entry in suite]
    else:
        watched = _resolve_named(session, project_id, wanted)
    seen = {found.benchmark.version.id for found in watched}
    watched += [
        _of_suite(entry)
        for entry in suite
        if entry.is_mandatory and entry.benchmark.version.id not in seen
    ]
    for required in repository.list_required(project_id):
        _require(watched, required)
    return tuple(watched)


def resolve_pinned(
    session: Session, project_id: UUID, pinned: Sequence[WatchedBenchmark]
) -> tuple[Watched, ...]:
    """What a job's policy watches, as it was resolved when the job was submitted.

    Raises:
        NotFound: A benchmark is gone.
    """
    return tuple(_resolve_named(session, project_id, pinned))


def tighten(policy: Policy, watched: Sequence[Watched]) -> Policy:
    """The policy with what is watched pinned, and no NLL limit looser than the project requires."""
    limits = [
        found.required_limit
        for found in watched
        if found.required_limit is not None and found.benchmark.version.scorer is Scorer.NLL
    ]
    return policy.model_copy(
        update={
            "benchmarks": tuple(found.pinned for found in watched),
            "max_nll_increase": min([policy.max_nll_increase, *limits]),
        }
    )


def pin_metric(policy: Policy, watched: Sequence[Watched], *, is_default: bool) -> Policy:
    """The policy with early stopping's benchmark pinned to its version.

    A project's default policy that names one which the job does not watch falls back to the validation loss:
    it is the project's wish, not the job's.

    Args:
        policy: Of the job.
        watched: What the job watches.
        is_default: The policy is the project's.

    Raises:
        BadRequest: The job's own policy names none that it watches, or a name of which it watches several versions.
    """
    stopping = policy.early_stopping
    if stopping.metric == VALID_LOSS:
        return policy
    found = find_metric(policy, [each.benchmark.reference for each in watched])
    if len(found) == 1:
        metric = found[0]
    elif is_default:
        metric = VALID_LOSS
    else:
        path = "retention.policy.early_stopping.metric"
        wrong = (
            f"names several versions ({', '.join(found)}); give one"
            if found
            else f"is neither '{VALID_LOSS}' nor a benchmark that the job watches"
        )
        raise BadRequest(f"{path}: '{stopping.metric}' {wrong}.", path, "unknown_metric")
    return policy.model_copy(
        update={"early_stopping": stopping.model_copy(update={"metric": metric})}
    )


def required_policy(project: Project) -> Policy:
    """By which a job that turned retention off is guarded where it is watched all the same: nothing stops early."""
    policy = (
        DEFAULTS
        if project.default_policy is None
        else Policy.model_validate(project.default_policy)
    )
    return policy.model_copy(update={"lever": None, "early_stopping": EarlyStopping(enabled=False)})


def require_benchmark(
    session: Session,
    project_id: UUID,
    reference: str,
    *,
    weight: float = 1.0,
    limit: float | None = None,
) -> RequiredVersion:
    """Makes every later job of a project watch a benchmark version, in place of any other version of it.

    Args:
        session: The caller's transaction.
        project_id: The project.
        reference: `name` (its newest version now) or `name@3`.
        weight: In the mean, at least.
        limit: Relative drop, of `nll` nats per token, that no policy can loosen; None takes the defaults.

    Raises:
        NotFound: The project sees no such benchmark.
        BadRequest: It is a domain benchmark, or the limit is none.
    """
    repository = BenchmarkRepository(session)
    named = repository.find_reference(project_id, reference)
    if named is None:
        raise NotFound(f"No benchmark is called '{reference}'.", "benchmark", "benchmark_not_found")
    if named.version.kind is not BenchmarkKind.GENERAL:
        raise BadRequest(
            f"'{reference}' measures what is learned; only a general benchmark can be required.",
            "benchmark",
        )
    is_nll = named.version.scorer is Scorer.NLL
    if limit is None:
        limit = DEFAULTS.max_nll_increase if is_nll else DEFAULTS.max_drop
    if not 0 < limit < (100 if is_nll else 1):
        raise BadRequest(f"The limit of '{reference}' must be above 0 and below 1.", "max_drop")
    if not 0 < weight <= 1e6:
        raise BadRequest("The weight must be above 0.", "weight")
    repository.drop_required(project_id, named.version.benchmark_id)
    repository.add_required(
        RequiredBenchmark(
            project_id=project_id,
            benchmark_version_id=named.version.id,
            weight=weight,
            limit=limit,
        )
    )
    return RequiredVersion(named, weight, limit)


def release_benchmark(session: Session, project_id: UUID, reference: str) -> None:
    """Takes a benchmark out of what a project requires; jobs that are there keep watching it.

    Raises:
        NotFound: The project does not require it.
    """
    repository = BenchmarkRepository(session)
    named = repository.find_reference(project_id, reference)
    if named is None or not repository.drop_required(project_id, named.version.benchmark_id):
        raise NotFound(
            f"The project does not require '{reference}'.", "benchmark", "benchmark_not_found"
        )


def list_required(session: Session, project_id: UUID) -> list[RequiredVersion]:
    """What a project requires."""
    return BenchmarkRepository(session).list_required(project_id)


def _resolve_named(
    session: Session, project_id: UUID, wanted: Sequence[WatchedBenchmark]
) -> list[Watched]:
    watched = [_resolve(session, project_id, place, wish) for place, wish in enumerate(wanted)]
    seen: set[UUID] = set()
    for place, found in enumerate(watched):
        if found.benchmark.version.id in seen:
            path = f"retention.policy.benchmarks.{place}.name"
            raise BadRequest(f"{path}: '{wanted[place].name}' is named twice.", path)
        seen.add(found.benchmark.version.id)
    return watched


def _resolve(session: Session, project_id: UUID, place: int, wish: WatchedBenchmark) -> Watched:
    named = BenchmarkRepository(session).find_reference(project_id, wish.name)
    if named is None:
        path = f"retention.policy.benchmarks.{place}.name"
        raise NotFound(
            f"{path}: no benchmark is called '{wish.name}'.", path, "benchmark_not_found"
        )
    return Watched(named, wish.weight, wish.max_drop, wish.expect, wish.min_gain)


def _of_suite(entry: SuiteBenchmark) -> Watched:
    return Watched(entry.benchmark, entry.weight, None)


def _require(watched: list[Watched], required: RequiredVersion) -> None:
    """Adds what is required, or holds what is there already to it."""
    is_nll = required.benchmark.version.scorer is Scorer.NLL
    for place, found in enumerate(watched):
        if found.benchmark.version.id == required.benchmark.version.id:
            own = required.limit if found.max_drop is None else min(found.max_drop, required.limit)
            watched[place] = replace(
                found,
                weight=max(found.weight, required.weight),
                max_drop=found.max_drop if is_nll else own,
                required_limit=required.limit,
            )
            return
    watched.append(
        Watched(
            required.benchmark,
            required.weight,
            None if is_nll else required.limit,
            required_limit=required.limit,
        )
    )
