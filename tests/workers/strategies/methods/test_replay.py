"""Replay: which rows are stored and how they enter the step."""

import pytest
import torch
from torch import nn

from tests.workers.strategies.stage import F64, Stage, make_rows
from workers.strategies.methods.replay import Replay


def store_of(count, seed=5, **knobs):
    stage = Stage([Replay(**knobs)], {"replay": 0.1}, general=make_rows(count, 1))
    stage.ctx.run_seed = seed
    (stream,) = [s for s in stage.streams() if s.name == "replay"]
    return stream


@pytest.mark.parametrize(
    ("count", "fraction", "least", "expected"),
    [(1000, 0.05, 32, 50), (1001, 0.05, 32, 51), (200, 0.05, 32, 32), (20, 0.05, 32, 20)],
)
def test_store_holds_a_share_of_the_rows_but_at_least_so_many(count, fraction, least, expected):
    stream = store_of(count, store_fraction=fraction, min_store_rows=least)
    assert len(set(stream.rows)) == len(stream.rows) == expected
    assert set(stream.rows) <= set(range(count))
    assert (stream.store, stream.counts_as_task, stream.rows_per_step) == ("general", True, 0.1)


def test_store_is_spread_over_the_file_and_follows_from_the_seed():
    rows = store_of(1000, store_fraction=0.1).rows
    assert [row // 10 for row in rows] == list(range(100))  # one from each stretch
    assert rows == store_of(1000, store_fraction=0.1).rows
    assert rows != store_of(1000, seed=6, store_fraction=0.1).rows


def test_strength_zero_adds_no_stream_and_keeps_the_store():
    replay = Replay()
    stage = Stage([replay], {"replay": 0.0})
    assert [s.name for s in stage.streams()] == ["domain"]
    store = replay.store
    stage.ctx.coefs["replay"] = 0.25
    stream = stage.streams()[1]
    assert stream.rows == store
    assert stream.rows_per_step == 0.25


def test_choosing_the_store_leaves_the_global_generator_alone():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    store_of(100)
    assert torch.equal(torch.get_rng_state(), before)


def test_row_share_and_token_share_are_reported():
    stage = Stage([Replay()], {"replay": 0.5}).train(1)
    metrics = stage.strategies[0].metrics()
    micros = Stage([Replay()], {"replay": 0.5}).micros()
    replayed = sum(int(m.source_mask_N(frozenset({"replay"})).sum()) for m in micros)
    everything = sum(m.positions_N.numel() for m in micros)
    assert metrics["rows"] == 4
    assert metrics["tokens"] == replayed
    assert metrics["token_share"] == pytest.approx(replayed / everything)


def test_another_store_is_refused_and_the_same_taken_up():
    stage = Stage([Replay()], {"replay": 0.5})
    stage.streams()
    state = stage.strategies[0].state_dict()
    stage.strategies[0].load_state_dict(state)
    other = Stage([Replay(min_store_rows=4)], {"replay": 0.5})
    other.streams()
    with pytest.raises(ValueError, match="store"):
        other.strategies[0].load_state_dict(state)


def test_without_general_rows_it_says_so():
    with pytest.raises(ValueError, match="no general rows"):
        Stage([Replay()], {"replay": 0.5}, general=[]).streams()


def test_replay_of_a_regression_is_the_weighted_normal_equation():
    """m domain rows and k replayed rows a step, one mean over both: weights m/n_d and k/n_r a row."""
    rng = torch.Generator().manual_seed(2)
    domain, general = (torch.randn(n, 3, generator=rng, dtype=F64) for n in (12, 8))
    y_domain, y_general = (torch.randn(n, generator=rng, dtype=F64) for n in (12, 8))
    stage = Stage(
        [Replay(store_fraction=1.0)],
        {"replay": 0.5},
        training=make_rows(12, 1),
        general=make_rows(8, 2),
        batch_size=12,
    )
    share = {s.name: s.rows_per_step * stage.batch_size / len(s.rows) for s in stage.streams()}
    weight = torch.tensor([share["domain"]] * 12 + [share["replay"]] * 8, dtype=F64)
    x, y = torch.cat([domain, general]), torch.cat([y_domain, y_general])
    solved = torch.linalg.solve(x.T @ (weight[:, None] * x), x.T @ (weight * y))

    model = nn.Linear(3, 1, bias=False, dtype=F64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    for _ in range(600):  # a step of 12 domain and 6 replayed rows, in expectation over the cursors
        residual = model(x)[:, 0] - y
        (0.5 * (weight * residual**2).sum() / weight.sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.testing.assert_close(model.weight.detach()[0], solved, rtol=0, atol=1e-8)
