"""What the trainer's suite sends: a score that is no number must not look like one that was not asked for."""

import json

import numpy as np

from app.domain.benchmarks import BenchmarkKind, Scorer, split_items, unpack_array
from app.domain.runplan import BenchmarkPlan
from workers.training.suite import Measured, Suite

NUM_ITEMS = 40


def test_a_scored_item_without_a_finite_score_travels_as_infinite(tmp_path):
    ids = [f"item-{i}" for i in range(NUM_ITEMS)]
    path = tmp_path / "items.jsonl"
    path.write_text(
        "".join(
            json.dumps({"id": key, "question": "?", "choices": ["a", "b"], "answer": 0}) + "\n"
            for key in ids
        )
    )
    plan = BenchmarkPlan(
        benchmark_version_id="v1",
        name="b",
        kind=BenchmarkKind.GENERAL,
        scorer=Scorer.MULTIPLE_CHOICE,
        weight=1.0,
        max_drop=None,
        path=str(path),
        sha256="0" * 64,
    )
    gate, report = split_items(ids, NUM_ITEMS)

    def score(_, indices):
        scores = np.full(NUM_ITEMS, np.nan, np.float32)
        scores[indices[1:]] = 1.0  # the first one asked for gives no number
        return Measured(scores, None)

    suite = Suite.read([plan], score, NUM_ITEMS)
    (sent,) = suite.packed(suite.measure("gate"), "gate")
    scores = unpack_array(sent.scores)
    assert np.isinf(scores[gate[0]])
    assert (scores[gate[1:]] == 1.0).all()
    assert np.isnan(scores[report]).all()
