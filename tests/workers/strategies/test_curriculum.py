"""Pacing: the competence's closed form, the rows that are drawn by it, and the general rows mixed in."""

import itertools
import math

import pytest
import torch
from torch.nn import functional as F

from tests.workers.strategies.stage import Stage
from workers.strategies.batch import Stream
from workers.strategies.curriculum import competence, mix_share, num_drawn
from workers.strategies.methods.progressive import Progressive


@pytest.mark.parametrize("power", [1.0, 2.0, 3.5])
@pytest.mark.parametrize("start", [0.01, 0.1, 1.0])
def test_competence_begins_at_c0_ends_at_1_and_never_falls(power, start):
    values = [competence(t, 40, start, power) for t in range(50)]
    assert values[0] == pytest.approx(start, rel=1e-12)
    assert values[40] == pytest.approx(1.0, rel=1e-12)
    assert values[41:] == [1.0] * 9
    assert values == sorted(values)
    # its p-th power grows by equal amounts
    powers = [value**power for value in values[:41]]
    steps = [b - a for a, b in itertools.pairwise(powers)]
    assert max(steps) - min(steps) < 1e-12


def test_competence_without_steps_is_complete():
    assert competence(0, 0, 0.1, 2.0) == 1.0


def test_the_mix_falls_as_a_cosine_to_its_floor():
    values = [mix_share(t, 20, 0.5, 0.05) for t in range(25)]
    assert values[0] == 0.5
    assert values[10] == pytest.approx((0.5 + 0.05) / 2)
    assert values[5] == pytest.approx(0.275 + 0.225 * math.sqrt(0.5))
    assert values[20:] == [0.05] * 5
    assert values == sorted(values, reverse=True)


def test_never_fewer_rows_than_a_step_draws():
    assert [num_drawn(c, 40, 8) for c in (0.0, 0.1, 0.5, 0.999, 1.0)] == [8, 8, 20, 39, 40]
    assert num_drawn(0.1, 3, 8) == 3
    assert num_drawn(0.3, 10, 1) == 3  # 3 / 10 <= 0.3 in spite of rounding


def make(strength=1.0, **knobs):
    knobs = {"mode": "none", "curriculum": "nll", "mix_start": None, **knobs}
    stage = Stage([Progressive(**knobs)], {"progressive": strength}, batch_size=2)
    stage.ctx.task_steps = 50
    return stage


def domain_of(stage):
    return next(s for s in stage.streams() if s.name == "domain")


def by_hand(stage, kind):
    """Difficulty of each row, one row at a time."""
    found = []
    for ids in stage.training:
        if kind == "length":
            found.append(float(len(ids)))
            continue
        positions = torch.arange(1, len(ids) - 1)
        logits = stage.base(torch.tensor([ids[:-1]]), positions)
        loss = F.cross_entropy(logits, torch.tensor(ids[2:]))
        found.append(float(loss.detach()))
    return found


@pytest.mark.parametrize("kind", ["nll", "length"])
def test_the_rows_drawn_are_those_whose_rank_is_within_the_competence(kind):
    stage = make(curriculum=kind, c0=0.2, curriculum_steps=0.6, p=2.0)
    values = by_hand(stage, kind)
    num_rows = len(values)
    seen = set()
    for step in range(40):
        stage.ctx.step = step
        allowed = competence(step, 30, 0.2, 2.0)
        ranks = {
            row: sum((other, k) <= (value, row) for k, other in enumerate(values)) / num_rows
            for row, value in enumerate(values)
        }
        stream = domain_of(stage)
        assert set(stream.rows) == {row for row, rank in ranks.items() if rank <= allowed + 1e-9}
        assert stream.is_uniform == (len(stream.rows) < num_rows)
        assert stage.strategies[0].metrics()["held_back"] == 1 - len(stream.rows) / num_rows
        seen.add(len(stream.rows))
    assert len(seen) > 10
    assert max(seen) == num_rows


def test_ranks_are_of_the_starting_model_and_made_once():
    stage = make()
    before = dict(stage.strategies[0].curriculum.values)
    stage.train(3)
    stage.strategies[0].on_task_start(stage.ctx)
    assert torch.equal(stage.strategies[0].curriculum.values["training"], before["training"])


def test_ranks_of_every_tasks_rows_are_cached_by_their_tokens():
    kept, made = {}, []

    def cached(key, make_it):
        if key not in kept:
            made.append(key)
            kept[key] = make_it()
        return kept[key]

    def of(rows):
        strategy = Progressive(mode="none", mix_start=None)
        return Stage([strategy], {"progressive": 1.0}, cached=cached, training=rows)

    first = of([[1, 2, 3, 4], [5, 6, 7]])
    assert len(made) == 1
    assert of([[1, 2, 3, 4], [5, 6, 7]]).strategies[0].curriculum.values.keys() == {"training"}
    assert len(made) == 1
    of([[1, 2, 3, 4], [5, 6, 8]])
    assert len(made) == 2
    assert first.strategies[0].curriculum.values["training"].shape == (2,)


def mixed(stage, step):
    stage.ctx.step = step
    return next((s for s in stage.streams() if s.name == "general"), None)


def test_general_rows_have_their_share_of_all_rows_and_count_as_task():
    stage = make(curriculum="none", mix_start=0.5, mix_end=0.05, curriculum_steps=0.4)
    for step in range(0, 30, 3):
        stream = mixed(stage, step)
        share = stream.rows_per_step / (1 + stream.rows_per_step)
        assert share == pytest.approx(mix_share(step, 20, 0.5, 0.05))
        assert stream.counts_as_task
        assert stage.strategies[0].metrics()["general_share"] == pytest.approx(share)
    assert make(curriculum="none", mix_start=None).streams()[1:] == ()


def test_the_strength_is_the_factor_on_the_general_share_where_nothing_is_constrained():
    half = mixed(make(0.5, curriculum="none", mix_start=0.4), 0)
    assert half.rows_per_step == pytest.approx(0.2 / 0.8)
    assert mixed(make(0.0, curriculum="none", mix_start=0.4), 0) is None


def test_replayed_rows_are_general_rows_already():
    stage = make(curriculum="none", mix_start=0.5, mix_end=0.05)
    stage.ctx.coefs["replay"] = 0.1
    assert mixed(stage, 0).rows_per_step == pytest.approx(1.0 - 0.1)
    assert mixed(stage, 30) is None  # replay's tenth is more than the floor's twentieth


def test_rows_that_are_distilled_anyway_serve_both():
    stage = make(curriculum="none", mix_start=0.5, mix_end=0.05)
    strategy = stage.strategies[0]
    domain = Stream("domain", (0, 1), "training", 1.0, counts_as_task=True)
    distilled = Stream("general", (4, 5), "general", 0.25, counts_as_task=False)
    for step, share in ((0, 1.0), (30, 0.25)):
        stage.ctx.step = step
        streams = strategy.edit_streams(stage.ctx, (domain, distilled))
        assert [s.name for s in streams] == ["domain", "general"]
        assert streams[1].rows_per_step == pytest.approx(share)
        assert streams[1].rows == (4, 5)
        assert streams[1].counts_as_task


def test_without_general_rows_there_is_nothing_to_mix_in():
    stage = make(curriculum="none", mix_start=0.5)
    stage.ctx.num_general_rows = 0
    with pytest.raises(ValueError, match="no general rows"):
        stage.streams()


def test_streams_are_made_anew_only_when_the_pace_has_moved_on():
    stage = make(c0=0.5, curriculum_steps=0.5)
    strategy = stage.strategies[0]
    stage.streams()
    asked = []
    for step in range(30):
        stage.ctx.step = step
        due = strategy.streams_changed(stage.ctx)
        asked.append(due)
        if due:
            before = strategy.curriculum.drawn
            stage.streams()
            assert strategy.curriculum.drawn > before
    counts = [num_drawn(competence(step, 25, 0.5, 2.0), 24, 2) for step in range(30)]
    assert asked == [False, *(b != a for a, b in itertools.pairwise(counts))]
    assert 0 < sum(asked) < 25
    assert not any(asked[26:])
