"""Cached distributions: made over ranks, looked up by row, refused where the row is another."""

import threading
from typing import Any

import pytest
import torch

from tests.workers.strategies.stage import Stage, make_micro
from workers.strategies.batch import Stream
from workers.strategies.distributions import (
    CachedTeacher,
    Distributions,
    base_distributions,
    make_distributions,
    rows_digest,
)
from workers.strategies.topk import keep_top


def predictor(stage):
    def predict(micro):
        with torch.no_grad():
            return stage.base(micro.input_ids_BT, micro.positions_N)

    return predict


def teacher_with(stage, rows, **knobs):
    teacher = CachedTeacher({"general"}, **{"k": 4, "temperature": 2.0, **knobs})
    stage.ctx.streams = (Stream("general", tuple(rows), "general", 0.5, counts_as_task=False),)
    teacher.fill(stage.ctx)
    return teacher


def micro_of(stage, rows, others=()):
    """General rows between domain rows, which nobody cached."""
    drawn = [("general", row, stage.general[row], False) for row in rows]
    drawn[1:1] = [("domain", row, stage.training[row], True) for row in others]
    return make_micro(drawn)


def test_look_up_gives_the_teachers_distributions_in_the_order_of_the_positions():
    stage = Stage([], {})
    micro = micro_of(stage, (7, 2, 11), others=(0, 1))
    found = teacher_with(stage, range(12)).look_up(micro)
    own = micro.source_mask_N(frozenset({"general"}))
    expected = keep_top(predictor(stage)(micro)[own], 4, 2.0)
    assert torch.equal(found.ids_NK, expected.ids_NK)
    torch.testing.assert_close(found.log_p_NK.double(), expected.log_p_NK, rtol=0, atol=2e-3)
    total = found.log_p_NK.exp().sum(-1) + found.log_tail_N.exp()
    torch.testing.assert_close(total, torch.ones_like(total))


def test_half_precision_costs_little_divergence():
    stage = Stage([], {})
    micro = micro_of(stage, range(12))
    whole = predictor(stage)(micro).log_softmax(-1)
    found = teacher_with(stage, range(12), k=11, temperature=1.0).look_up(micro)
    error = whole.exp().gather(-1, found.ids_NK) * (whole.gather(-1, found.ids_NK) - found.log_p_NK)
    assert error.sum(-1).abs().max() < 1.5e-4  # nats


@pytest.mark.parametrize("size", [40_000, 70_000])
def test_ids_beyond_15_bits_survive(size):
    stage = Stage([], {})
    generator = torch.Generator().manual_seed(1)
    table = torch.randn(200, size, generator=generator)

    def predict(micro):
        return table[: len(micro.positions_N)]

    rows = [0, 1]
    made = make_distributions(stage.ctx, "general", rows, predict, k=3, temperature=1.0)
    assert made["ids_CK"].dtype == (torch.int16 if size <= 65_536 else torch.int32)
    teacher = CachedTeacher({"general"}, k=3, temperature=1.0)
    teacher._caches["general"] = ("general", Distributions(made))
    micro = micro_of(stage, rows)
    found = teacher.look_up(micro)
    assert torch.equal(found.ids_NK, keep_top(predict(micro), 3, 1.0).ids_NK)
    assert found.ids_NK.max() > 32_767


def test_two_ranks_make_together_what_one_makes_alone():
    alone = Stage([], {}, micro_rows=4)
    expected = make_distributions(
        alone.ctx, "general", range(11), predictor(alone), k=4, temperature=1.0
    )
    barrier = threading.Barrier(2, timeout=60)
    given: dict[int, Any] = {}
    made: dict[int, Any] = {}
    # made one after the other: threads share the generator that a model is drawn from
    stages = [Stage([], {}, micro_rows=4) for _ in range(2)]

    def work(rank):
        stage = stages[rank]
        every = stage.ctx.store_micros

        def all_reduce(tensor):
            given[rank] = tensor.clone()
            barrier.wait()
            tensor.copy_(given[0] + given[1])
            barrier.wait()

        stage.ctx.store_micros = lambda store, rows: iter(list(every(store, rows))[rank::2])
        stage.ctx.all_reduce, stage.ctx.rank, stage.ctx.world_size = all_reduce, rank, 2
        made[rank] = make_distributions(
            stage.ctx, "general", range(11), predictor(stage), k=4, temperature=1.0
        )

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for found in made.values():
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_cache_is_keyed_by_content_and_settings_and_made_once():
    kept = {}

    def cached(key, make):
        if key not in kept:
            kept[key] = make()
        return kept[key]

    def keys(stage, rows=range(6), **knobs):
        before = set(kept)
        settings = {"k": 4, "temperature": 1.0, **knobs}
        base_distributions(stage.ctx, "general", rows, **settings)
        return set(kept) - before

    assert len(keys(Stage([], {}, cached=cached))) == 1
    assert not keys(Stage([], {}, cached=cached))  # another job with the same rows
    changed = Stage([], {}, cached=cached)
    changed.general[3] = changed.general[3][:-1]
    assert rows_digest(changed.ctx, "general", [3]) != rows_digest(
        Stage([], {}).ctx, "general", [3]
    )
    assert len(keys(changed)) == 1
    for knobs in ({"k": 5}, {"temperature": 2.0}, {"rows": range(5)}):
        assert len(keys(Stage([], {}, cached=cached), **knobs)) == 1
    assert all(key.startswith("base/") for key in kept)  # shared whatever the job's adapters


def test_rows_that_are_not_cached_or_are_others_by_now_are_refused():
    stage = Stage([], {})
    teacher = teacher_with(stage, range(5))
    with pytest.raises(ValueError, match="no cached"):
        teacher.look_up(micro_of(stage, [5]))
    shorter = make_micro([("general", 2, stage.general[2][:-1], False)])
    with pytest.raises(ValueError, match="not the one"):
        teacher.look_up(shorter)


def test_only_what_streams_newly_hold_is_cached():
    stage = Stage([], {})
    passes = []
    every = stage.ctx.store_micros

    def watched(store, rows):
        passes.append(list(rows))
        return every(store, rows)

    stage.ctx.store_micros = watched
    released = []
    stage.ctx.release_base = lambda: released.append(True)
    teacher = teacher_with(stage, range(5))
    teacher.fill(stage.ctx)
    assert passes == [list(range(5))]
    stage.ctx.streams = (Stream("general", (1, 2), "general", 0.5, counts_as_task=False),)
    teacher.fill(stage.ctx)
    assert len(passes) == 1
    stage.ctx.streams = (Stream("general", (1, 9), "general", 0.5, counts_as_task=False),)
    teacher.fill(stage.ctx)
    assert passes[1:] == [[1, 9]]
    assert len(released) == 2


def test_a_run_without_rows_or_base_says_so():
    stage = Stage([], {})
    stage.ctx.base_forward = None
    with pytest.raises(ValueError, match="starting model"):
        base_distributions(stage.ctx, "general", [0], k=2, temperature=1.0)
    stage.ctx.rows_micro = None
    with pytest.raises(ValueError, match="no rows"):
        rows_digest(stage.ctx, "general", [0])
