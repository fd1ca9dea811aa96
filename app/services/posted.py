"""What is read of a posted result: its items in the benchmark's order, its value, its summary."""

import json
import math

import numpy as np
from sqlalchemy.orm import Session

from app.db.models import BenchmarkVersion, File
from app.domain.benchmarks import Scorer, Scores, item_id
from app.domain.results import PostedResult
from app.domain.sensing import Summary
from app.errors import BadRequest
from app.services.storage import Storage


def align_items(
    session: Session, storage: Storage, version: BenchmarkVersion, result: PostedResult
) -> Scores | None:
    """The items' scores in the version's order, NaN where none was posted; None when no id is the baseline's."""
    if result.items is None:
        return None
    file = session.get_one(File, version.file_id)
    lines = storage.read_bytes(file.path).splitlines()
    places = {
        item_id(json.loads(line)): place for place, line in enumerate(filter(bytes.strip, lines))
    }
    values = np.full(version.num_items, np.nan, dtype=np.float32)
    matched = 0
    for item in result.items:
        place = places.get(item.id)
        if place is not None:
            values[place] = item.score
            matched += 1
    return values if matched else None


def value_of(result: PostedResult) -> float:
    """The posted value, else the mean of the items."""
    if result.value is not None:
        return result.value
    scores = [item.score for item in result.items or ()]
    return math.fsum(scores) / len(scores)


def check_range(result: PostedResult, scorer: Scorer) -> None:
    """Accuracies are shares: a percentage would read as a huge gain."""
    if scorer is Scorer.NLL:
        return
    scores = [item.score for item in result.items or ()]
    for name, values in (
        ("value", [] if result.value is None else [result.value]),
        ("items", scores),
    ):
        if any(not 0 <= value <= 1 for value in values):
            raise BadRequest(f"{name}: scores of '{result.benchmark}' lie between 0 and 1.", name)


def summarise(result: PostedResult, scorer: Scorer) -> Summary | None:
    """Value, standard error and number of samples; None without a number of samples.

    Items of `nll` that match no baseline item have no token counts, so they give no value of their own.
    """
    if result.items is None:
        if result.n_samples is None or result.value is None:
            return None
        return Summary(value=result.value, stderr=result.stderr, n=result.n_samples)
    if scorer is Scorer.NLL:
        return None
    scores = np.array([item.score for item in result.items])
    stderr = float(scores.std(ddof=1)) / math.sqrt(len(scores)) if len(scores) > 1 else None
    return Summary(value=value_of(result), stderr=stderr, n=len(scores))
