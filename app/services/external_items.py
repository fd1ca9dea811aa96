"""Item scores that external runs post, brought into the order of the benchmark's own items."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from sqlalchemy.orm import Session

from app.db.models import BenchmarkVersion, File
from app.db.repositories.history import HistoryRepository
from app.domain.benchmarks import BenchmarkScores, Scorer, Scores, item_id, pack_array
from app.domain.external import ScoredBenchmark
from app.domain.runplan import BenchmarkPlan
from app.errors import BadRequest, Conflict
from app.services.evaluations import Watch, row_id, unpack_bytes
from app.services.storage import Storage


@dataclass(frozen=True, slots=True)
class Aligned:
    """One posted benchmark in the order of its version's items, NaN where none was posted."""

    plan: BenchmarkPlan
    version: BenchmarkVersion
    values: Scores
    tokens: Scores | None

    def as_scores(self) -> BenchmarkScores:
        """As scores travel inside."""
        return BenchmarkScores(
            benchmark_version_id=str(self.version.id),
            item_set="all",
            scores=pack_array(self.values),
            tokens=None if self.tokens is None else pack_array(self.tokens),
        )


def align_all(
    session: Session, storage: Storage, watch: Watch, sent: Sequence[ScoredBenchmark]
) -> list[Aligned]:
    """Posted benchmarks in the order of their versions' items.

    Raises:
        BadRequest: A benchmark isn't watched or occurs twice, an item isn't its, or a score is out of range.
        Conflict: A suite hash unlike the watched version's.
    """
    found = [_align(session, storage, watch, place, scores) for place, scores in enumerate(sent)]
    seen: set[str] = set()
    for place, aligned in enumerate(found):
        if aligned.plan.name in seen:
            path = f"scores.{place}.benchmark"
            raise BadRequest(f"{path}: '{aligned.plan.name}' occurs twice.", path)
        seen.add(aligned.plan.name)
    return found


def _align(
    session: Session, storage: Storage, watch: Watch, place: int, sent: ScoredBenchmark
) -> Aligned:
    plan = find_plan(watch, place, sent)
    version = watch.versions[row_id(plan.benchmark_version_id)]
    if sent.suite_sha256 not in {None, version.items_sha256}:
        path = f"scores.{place}.suite_sha256"
        raise Conflict(f"{path}: the run watches {version.items_sha256}.", path, "suite_mismatch")
    places = _item_places(session, storage, version)
    values = np.full(version.num_items, np.nan, dtype=np.float32)
    tokens = np.full(version.num_items, np.nan, dtype=np.float32)
    path = f"scores.{place}.items"
    for item in sent.items:
        at = places.get(item.id)
        if at is None:
            raise BadRequest(
                f"{path}: '{plan.name}' has no item '{item.id[:80]}'.", path, "unknown_item"
            )
        if plan.scorer is not Scorer.NLL and not 0 <= (item.score or 0.0) <= 1:
            raise BadRequest(f"{path}: scores of '{plan.name}' lie between 0 and 1.", path)
        values[at] = math.inf if item.score is None else item.score
        tokens[at] = math.nan if item.tokens is None else item.tokens
    has_tokens = plan.scorer is Scorer.NLL and not np.isnan(tokens[~np.isnan(values)]).any()
    return Aligned(plan, version, values, tokens if has_tokens else None)


def find_plan(watch: Watch, place: int, sent: ScoredBenchmark) -> BenchmarkPlan:
    """The watched benchmark that was posted.

    Raises:
        BadRequest: There is none.
    """
    for plan in watch.benchmarks:
        if sent.benchmark in {plan.name, plan.name.partition("@")[0]}:
            return plan
    path = f"scores.{place}.benchmark"
    raise BadRequest(
        f"{path}: the run does not watch '{sent.benchmark[:80]}'.", path, "benchmark_not_watched"
    )


def _item_places(session: Session, storage: Storage, version: BenchmarkVersion) -> dict[str, int]:
    lines = storage.read_bytes(session.get_one(File, version.file_id).path).splitlines()
    return {
        item_id(json.loads(line)): place for place, line in enumerate(filter(bytes.strip, lines))
    }


def with_tokens(history: HistoryRepository, watch: Watch, found: Aligned) -> Aligned:
    """Token counts of `nll` texts from the baseline where the trainer sent none: the texts are the same."""
    if found.plan.scorer is not Scorer.NLL or found.tokens is not None:
        return found
    row = history.find_baseline(watch.baseline_key, found.version.id)
    if row is None or row.tokens is None:
        return replace(found, tokens=np.full_like(found.values, np.nan))
    return replace(found, tokens=unpack_bytes(row.tokens))
