"""Which rows are drawn, how they are split, and what a micro-batch holds."""

import json
from collections import Counter

import numpy as np
import pytest
import torch

from workers.data.batches import (
    DrawnRow,
    RowSampler,
    build_micro,
    fed_length,
    split_micros,
)
from workers.strategies.batch import Stream


class ListRows:
    """Rows from plain lists of (ids, weights)."""

    def __init__(self, rows):
        self.rows = rows

    @property
    def lengths(self):
        return np.asarray([len(ids) for ids, _ in self.rows], dtype=np.int64)

    def row(self, index):
        ids, weights = self.rows[index]
        return np.asarray(ids, np.int32), np.asarray(weights, np.float32)


def domain(count):
    return Stream("domain", tuple(range(count)), "training", 1.0, counts_as_task=True)


def replay(rows, share):
    return Stream("replay", rows, "general", share, counts_as_task=True)


def make_lengths(seed, count):
    values = np.random.default_rng(seed).lognormal(4.2, 0.6, count)
    return np.clip(values, 5, 300).astype(np.int64)


def make_sampler(*, batch_size=8, rows=400, general=300, seed=3):
    lengths = {"training": make_lengths(0, rows), "general": make_lengths(1, general)}
    return RowSampler(seed=seed, batch_size=batch_size, lengths=lengths), lengths


@pytest.mark.parametrize(("rows", "batch"), [(400, 8), (37, 8), (5, 8), (64, 1), (1, 4)])
def test_every_row_comes_once_an_epoch_and_every_step_is_full(rows, batch):
    sampler, _ = make_sampler(batch_size=batch, rows=rows)
    seen = []
    for _ in range(3 * rows // batch + 1):
        drawn = sampler.draw((domain(rows),))
        assert len(drawn) == batch
        seen += [row.row for row in drawn]
    for epoch in range(len(seen) // rows):
        assert sorted(seen[epoch * rows : (epoch + 1) * rows]) == list(range(rows))


def test_epochs_come_in_different_orders_and_seeds_differ():
    sampler, _ = make_sampler(rows=64)
    epochs = [[r.row for _ in range(8) for r in sampler.draw((domain(64),))] for _ in range(2)]
    other, _ = make_sampler(rows=64, seed=4)
    assert epochs[0] != epochs[1]
    assert epochs[0] != [r.row for _ in range(8) for r in other.draw((domain(64),))]


def padding_waste(sampler, lengths, streams, steps):
    real = padded = 0
    for _ in range(steps):
        for micro in split_micros(sampler.draw(streams), lengths, max_tokens=8192):
            widths = [fed_length(lengths[r.store][r.row]) for r in micro]
            real += sum(widths)
            padded += len(widths) * max(widths)
    return 1 - real / padded


@pytest.mark.parametrize("share", [0.0, 0.25])
def test_length_buckets_and_matched_rows_keep_padding_to_a_few_percent(share):
    sampler, lengths = make_sampler(rows=4000, general=3000)
    streams = (domain(4000), replay(tuple(range(3000)), share))
    assert padding_waste(sampler, lengths, streams, 400) < 0.06


@pytest.mark.parametrize("batch", [1, 3, 8])
@pytest.mark.parametrize("share", [0.05, 0.1, 0.25, 0.5])
def test_cumulative_rows_of_a_stream_are_exact(batch, share):
    sampler, _ = make_sampler(batch_size=batch)
    given = 0
    for step in range(1, 120):
        drawn = sampler.draw((domain(400), replay(tuple(range(300)), share)))
        given += sum(row.source == "replay" for row in drawn)
        assert abs(given - share * step * batch) <= 1


def test_every_store_row_comes_once_a_replay_epoch():
    sampler, _ = make_sampler(batch_size=8)
    rows = tuple(range(3, 120, 2))
    seen: list[int] = []
    while len(seen) < 2 * len(rows):
        seen += [
            r.row for r in sampler.draw((domain(400), replay(rows, 0.5))) if r.source == "replay"
        ]
    assert sorted(seen[: len(rows)]) == list(rows)
    assert sorted(seen[len(rows) : 2 * len(rows)]) == list(rows)


def test_a_stream_that_is_turned_on_leaves_the_domain_order_as_it_was():
    plain, _ = make_sampler()
    mixed, _ = make_sampler()
    for step in range(60):
        share = 0.0 if step < 20 else 0.3 if step < 40 else 0.1
        streams = (domain(400),) if step < 20 else (domain(400), replay(tuple(range(300)), share))
        drawn = [r for r in mixed.draw(streams) if r.source == "domain"]
        assert drawn == list(plain.draw((domain(400),)))


def test_saved_cursors_go_on_with_the_same_rows():
    sampler, _ = make_sampler()
    streams = (domain(400), replay(tuple(range(300)), 0.3))
    for _ in range(57):
        sampler.draw(streams)
    other, _ = make_sampler()
    other.load_state(json.loads(json.dumps(sampler.state())))
    for _ in range(120):
        assert sampler.draw(streams) == other.draw(streams)


@pytest.mark.parametrize("spare", [None, 64])
def test_micro_batches_keep_the_budget_and_lose_no_row(spare):
    sampler, lengths = make_sampler(batch_size=64)
    drawn = sampler.draw((domain(400), replay(tuple(range(300)), 0.5)))
    micros = split_micros(drawn, lengths, max_tokens=1000, spare_padding=spare)
    assert Counter(row for micro in micros for row in micro) == Counter(drawn)
    for micro in micros:
        widths = [fed_length(lengths[r.store][r.row]) for r in micro]
        assert len(widths) * max(widths) <= 1000
        if spare is not None:
            assert len(widths) * max(widths) - sum(widths) <= spare


def test_a_row_over_the_budget_stands_alone():
    lengths = {"training": np.asarray([5000, 10, 10])}
    drawn = [DrawnRow("domain", "training", i, True) for i in range(3)]
    micros = split_micros(drawn, lengths, max_tokens=64)
    assert [[r.row for r in micro] for micro in micros] == [[1, 2], [0]]


def test_a_micro_batch_holds_the_positions_whose_next_token_counts():
    rows = ListRows([([5, 6, 7, 8], [1, 0, 1, 0.5]), ([9, 10], [0, 1]), ([11], [1])])
    drawn = [DrawnRow("domain", "training", 0, True), DrawnRow("general", "training", 1, False)]
    drawn.append(DrawnRow("replay", "training", 2, True))
    micro = build_micro(drawn, {"training": rows}, torch.device("cpu"))
    assert micro.input_ids_BT.tolist() == [[5, 6, 7], [9, 0, 0], [11, 0, 0]]
    assert micro.positions_N.tolist() == [1, 2, 3]
    assert micro.targets_N.tolist() == [7, 8, 10]
    assert micro.weights_N.tolist() == [1.0, 0.5, 1.0]
    assert micro.row_of_N.tolist() == [0, 0, 1]
    assert micro.is_task_B.tolist() == [True, False, True]
    assert micro.sample_ids == (0, 1, 2)
    assert micro.source_mask_N(frozenset({"general"})).tolist() == [False, False, True]


def test_a_micro_batch_without_rows_is_empty():
    micro = build_micro([], {}, torch.device("cpu"))
    assert micro.input_ids_BT.shape == (0, 1)
    assert micro.positions_N.numel() == micro.is_task_B.numel() == 0


def test_a_uniform_stream_draws_from_its_rows_alone_and_epochs_stand_still():
    whole = domain(64)
    easiest = Stream("domain", tuple(range(0, 64, 3)), "training", 1.0, True, is_uniform=True)
    paced, _ = make_sampler(rows=64)
    plain, _ = make_sampler(rows=64)
    expected = [plain.draw((whole,)) for _ in range(12)]
    assert [paced.draw((whole,)) for _ in range(3)] == expected[:3]
    counts: Counter[int] = Counter()
    for _ in range(300):
        rows = [row.row for row in paced.draw((easiest,))]
        assert len(set(rows)) == len(rows) == 8
        counts.update(rows)
    assert set(counts) == set(easiest.rows)
    mean = 300 * 8 / len(easiest.rows)
    chi_squared = sum((count - mean) ** 2 / mean for count in counts.values())
    assert chi_squared < 60  # 21 degrees of freedom, and draws without replacement vary less
    assert [paced.draw((whole,)) for _ in range(9)] == expected[3:]


def test_a_uniform_stream_goes_on_from_its_state_and_copes_with_few_rows():
    few = Stream("domain", (3, 5), "training", 1.0, True, is_uniform=True)
    first, _ = make_sampler()
    second, _ = make_sampler()
    general = replay(tuple(range(20)), 0.5)
    for _ in range(5):
        first.draw((few, general))
    second.load_state(json.loads(json.dumps(first.state())))
    for _ in range(5):
        drawn = first.draw((few, general))
        assert second.draw((few, general)) == drawn
        assert [row.source for row in drawn] == ["domain"] * 8 + ["replay"] * 4
        assert {row.row for row in drawn if row.source == "domain"} <= {3, 5}
