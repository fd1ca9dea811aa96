"""Results that nothing watches: there is no baseline to compare them with, so they are written all at once."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from uuid import UUID, uuid4

from sqlalchemy.orm import Session

from app.db.repositories.posted_results import PlainRow, PostedResultRepository, Recipient
from app.domain.identifiers import parse_id
from app.domain.results import UNNAMED, PostedResult
from app.errors import NotFound
from app.services.posted import value_of

LookKey = tuple[str, str, int | None]  # type and id of the subject, step


def record_unwatched(
    session: Session, project_id: UUID, looks: Mapping[LookKey, Sequence[PostedResult]]
) -> dict[LookKey, tuple[PlainRow, ...]]:
    """Records the looks none of whose results is on a benchmark that the subject's run watches.

    No row is locked for them: only looks that are compared with a baseline are counted. Looks at an unknown
    subject are left to the caller too.
    """
    repository = PostedResultRepository(session)
    found = _find(repository, project_id, looks)
    plain = {
        key: results
        for key, results in looks.items()
        if key[:2] in found and not _is_watched(found[key[:2]], results)
    }
    if not plain:
        return {}
    now = repository.now()
    written = {
        key: tuple(
            PlainRow(
                id=uuid4(),
                recipient=found[key[:2]],
                benchmark=result.benchmark,
                metric=result.metric or UNNAMED,
                step=result.step,
                value=value_of(result),
                stderr=result.stderr,
                n_samples=result.n_samples if result.items is None else len(result.items),
                is_paired=result.items is not None,
                measured_at=result.measured_at or now,
                created_at=now,
            )
            for result in results
        )
        for key, results in plain.items()
    }
    repository.add(project_id, [row for rows in written.values() for row in rows])
    return written


def _find(
    repository: PostedResultRepository,
    project_id: UUID,
    looks: Mapping[LookKey, Sequence[PostedResult]],
) -> dict[tuple[str, str], Recipient]:
    """The known subjects, by type and id as they were posted."""
    jobs: dict[UUID, str] = {}
    for kind, text, _ in looks:
        if kind == "fine_tuning.job":
            with suppress(NotFound):  # the caller finds no such job either, and says so
                jobs[parse_id("job", text)] = text
    names = {text for kind, text, _ in looks if kind == "model"}
    found: dict[tuple[str, str], Recipient] = {}
    if jobs:
        for key, recipient in repository.find_jobs(project_id, jobs).items():
            found["fine_tuning.job", jobs[key]] = recipient
    if names:
        for name, recipient in repository.find_models(project_id, names).items():
            found["model", name] = recipient
    return found


def _is_watched(recipient: Recipient, results: Sequence[PostedResult]) -> bool:
    """Whether one of a look's results may be on a benchmark of the run, whichever version it names."""
    watched = {name.partition("@")[0] for name in recipient.watched}
    return any(result.benchmark.partition("@")[0] in watched for result in results)
