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


def gradients_of(strategy, *, strength=0.5, **overrides):
    """Of one step, the parts of its loss, and the stage."""
    stage = Stage([strategy], {"replay": strength}, **overrides)
    move(stage.model)
    stage.strategies[0].on_step_start(stage.ctx)
    return stage.gradients(), stage.losses[-1], stage


def move(model):
    with torch.no_grad():
        for index, p in enumerate(model.parameters()):
            wave = torch.cos(torch.arange(p.numel(), dtype=p.dtype) + index)
            p.add_(0.2 * wave.view_as(p))


def means(stage):
    """Sums of cross-entropy over domain and replayed tokens, with their counts."""
    sums = {"domain": [0.0, 0], "replay": [0.0, 0]}
    for micro in stage.micros():
        with torch.no_grad():
            logits = stage.model(micro.input_ids_BT, micro.positions_N)
        nats = nn.functional.cross_entropy(logits, micro.targets_N, reduction="none")
        for name, found in sums.items():
            mask = micro.source_mask_N(frozenset({name}))
            found[0] += float(nats[mask].sum())
            found[1] += int(mask.sum())
    return sums


def test_der_beta_is_the_weight_of_a_replayed_token():
    stage = Stage([Replay(der_beta=0.3)], {"replay": 0.5}, micro_rows=16)
    (micro,) = stage.micros()
    mask = micro.source_mask_N(frozenset({"replay"}))
    assert torch.equal(micro.weights_N[mask].unique(), torch.tensor([0.3]))
    assert torch.equal(micro.weights_N[~mask].unique(), torch.tensor([1.0]))


def test_fixed_weighting_gives_replayed_rows_a_mean_of_their_own():
    _, losses, stage = gradients_of(Replay(weighting="fixed", der_beta=0.7), micro_rows=3)
    (d_sum, d_count), (r_sum, r_count) = means(stage).values()
    assert losses["task"] == pytest.approx(d_sum / d_count, rel=1e-12)
    assert losses["replay"] == pytest.approx(0.7 * r_sum / r_count, rel=1e-6)


def test_der_is_the_divergence_from_the_stored_distributions_times_alpha():
    strategy = Replay(der_alpha=0.4, der_beta=0.0, weighting="fixed", der_temperature=2.0, top_k=11)
    _, losses, stage = gradients_of(strategy)
    total, count = 0.0, 0
    for micro in stage.micros():
        mask = micro.source_mask_N(frozenset({"replay"}))
        with torch.no_grad():
            q = (stage.model(micro.input_ids_BT, micro.positions_N)[mask] / 2).log_softmax(-1)
            p = (stage.base(micro.input_ids_BT, micro.positions_N)[mask] / 2).log_softmax(-1)
        total += 4 * float((p.exp() * (p - q)).sum())
        count += int(mask.sum())
    assert losses["der"] == pytest.approx(0.4 * total / count, rel=2e-3)  # half precision
    assert strategy.metrics()["der_nats"] == pytest.approx(total / count, rel=2e-3)


def test_der_at_the_stored_student_is_nothing():
    stage = Stage([Replay(der_alpha=1.0, top_k=4)], {"replay": 0.5})
    with_der = stage.gradients()
    without = Stage([Replay()], {"replay": 0.5}).gradients()
    assert abs(stage.losses[-1]["der"]) < 1e-6
    for name, gradient in without.items():
        torch.testing.assert_close(with_der[name], gradient, rtol=0, atol=1e-4)


def test_alpha_and_beta_zero_are_plain_training_on_the_same_domain_rows():
    strategy = Replay(der_alpha=0.0, der_beta=0.0, weighting="fixed")
    found, losses, _ = gradients_of(strategy)
    plain = Stage([], {})
    move(plain.model)
    expected = plain.gradients()
    assert losses["replay"] == 0.0
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-14)


def test_rows_are_decoded_by_the_base_once_and_kept_over_tasks():
    strategy = Replay(source="generated", generated_rows=4, generated_tokens=3)
    stage = Stage([strategy], {"replay": 0.5}, general=[])
    assert not strategy.needs().general_rows
    first = stage.stores
    stage.streams()
    made = [list(row) for row in first["replay-generated-0"]]
    move(stage.model)
    stage.train(2)
    stage.ctx.task_index = 1
    strategy.on_task_start(stage.ctx)
    assert [list(row) for row in stage.stores["replay-generated-0"]] == made
    again = Stage([Replay(source="generated", generated_rows=4, generated_tokens=3)], {"replay": 0})
    again.ctx.coefs["replay"] = 0.5
    again.streams()
    assert again.stores["replay-generated-0"] == made  # by the run's seed, and by the base


def finish_task(stage):
    """Ends the first of two tasks and begins the second, on other rows."""
    (strategy,) = stage.strategies
    stage.ctx.num_tasks = 2
    strategy.on_task_end(stage.ctx)
    stage.stores["training-1"] = make_rows(24, 9)
    stage.ctx.task_index = 1
    return strategy


@pytest.mark.parametrize(("sampling", "shares"), [("quota", (0.25, 0.25)), ("uniform", None)])
def test_finished_domains_are_replayed_beside_general_rows(sampling, shares):
    strategy = Replay(
        domain_store_fraction=0.25, sampling=sampling, store_fraction=0.1, min_store_rows=2
    )
    stage = Stage([strategy], {"replay": 0.5})
    stage.train(1)
    assert not strategy.streams_changed(stage.ctx)
    finish_task(stage)
    assert strategy.streams_changed(stage.ctx)
    earlier, general = stage.streams()[1:]
    assert (earlier.name, earlier.store, len(earlier.rows)) == ("earlier-0", "training", 6)
    assert (general.name, len(general.rows)) == ("replay", 2)
    expected = shares or (0.5 * 6 / 8, 0.5 * 2 / 8)
    assert (earlier.rows_per_step, general.rows_per_step) == pytest.approx(expected)
    assert earlier.key != general.key
    before = strategy.earlier
    strategy.on_task_end(stage.ctx)  # of the last task: nothing comes after it
    assert strategy.earlier == before


def test_nothing_is_kept_of_a_domain_unless_asked_for():
    stage = Stage([Replay()], {"replay": 0.5})
    assert finish_task(stage).earlier == {}


def test_earlier_rows_keep_what_the_model_said_of_them_when_it_had_learned_them():
    def make():
        return Replay(domain_store_fraction=0.25, source="none", der_alpha=1.0, top_k=11)

    stage = Stage([make()], {"replay": 0.5})
    stage.train(3)
    strategy = finish_task(stage)
    stage.gradients()
    assert abs(stage.losses[-1]["der"]) < 1e-6  # the model is still the one that said it
    state = strategy.state_dict()
    other = make()
    Stage([other], {"replay": 0.5}, start=False).streams()
    other.load_state_dict(state)
    assert other.earlier == strategy.earlier
    assert other.state_dict()["tensors"].keys() == state["tensors"].keys()
    tensors = {k: v for k, v in state["tensors"].items() if "log_p" not in k}
    with pytest.raises(ValueError, match="not all there"):
        other.load_state_dict({**state, "tensors": tensors})
    move(stage.model)
    stage.gradients()
    assert stage.losses[-1]["der"] > 1e-4


def test_without_any_rows_there_is_no_stream():
    stage = Stage([Replay(source="none", domain_store_fraction=0.5)], {"replay": 0.5}, general=[])
    assert [s.name for s in stage.streams()] == ["domain"]
