"""Decoding by the model in training: against a plain loop without a cache, on any batch and any rank."""

import numpy as np
import pytest
import torch
from scipy import stats

from tests.workers.training.runs import make_plan, make_run
from workers.evaluation.forward import Reader
from workers.strategies.context import Decoding
from workers.training.sampling import closing_tokens, decode, sample_rows


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(make_plan(tmp_path_factory.mktemp("plain"), training={"type": "lora"}))


def uniforms(rows, tokens, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(rows, tokens, generator=generator, dtype=torch.float64)


def plain_decode(model, head, line, temperature, closing):
    """One row, one token at a time, whole forwards."""
    ids = list(head)
    for uniform in line.tolist():
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].double()
        mass = np.cumsum((logits / temperature).softmax(-1).numpy())
        ids.append(int(np.searchsorted(mass, uniform * mass[-1], side="right")))
        if ids[-1] in closing:
            break
    return ids[len(head) :]


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_batches_with_a_cache_say_what_a_plain_loop_says(run, temperature):
    heads = [[1, 7], [5], [1, 7, 9, 30, 31], [200, 201]]
    lines = uniforms(len(heads), 12)
    closing = frozenset(range(60))  # a fifth of the vocabulary: rows end early
    run.model.eval()
    with torch.inference_mode():
        said = decode(Reader(run.model), heads, lines, temperature=temperature, closing=closing)
        for head, line, own in zip(heads, lines, said, strict=True):
            assert own == plain_decode(run.model, head, line, temperature, closing)
    run.model.train()
    assert any(len(own) < 12 for own in said)
    assert all(own[-1] in closing or len(own) == 12 for own in said)


def test_tokens_follow_the_models_distribution(run):
    count = 4000
    run.model.eval()
    with torch.inference_mode():
        said = decode(
            Reader(run.model),
            [[1, 7]] * count,
            uniforms(count, 1),
            temperature=0.7,
            closing=frozenset(),
        )
        logits = run.model(input_ids=torch.tensor([[1, 7]])).logits[0, -1].double()
    run.model.train()
    expected = (logits / 0.7).softmax(-1).numpy() * count
    seen = np.bincount([own[0] for own in said], minlength=len(expected))
    common = expected >= 5
    table = [np.append(x[common], x[~common].sum()) for x in (seen, expected)]
    table = [x[table[1] > 0] for x in table]  # where nothing is rare there is no rest
    assert stats.chisquare(*table).pvalue > 1e-3


def sample(run, rows=range(10), *, seed=1, base=False, **knobs):
    decoding = Decoding(**{"num_tokens": 6, **knobs})
    generator = torch.Generator().manual_seed(seed)
    return sample_rows(run, "training", list(rows), decoding, generator, base=base)


def test_prompts_are_what_comes_before_the_first_supervised_token(run):
    made = sample(run)
    for row, (ids, weights) in enumerate(made):
        own, own_weights = run.stores["training"].row(row)
        head = max(int(np.flatnonzero(own_weights[1:])[0]) + 1, 1)
        assert ids[:head] == own[:head].tolist()
        assert weights == [0.0] * head + [1.0] * (len(ids) - head)
        assert 1 <= len(ids) - head <= 6


def test_a_start_holds_no_more_than_what_all_rows_begin_with(run):
    made = sample(run, prompts="start")
    firsts = [int(run.stores["training"].row(row)[0][0]) for row in range(10)]
    assert [ids[0] for ids, _ in made] == firsts  # random rows share nothing
    assert all(weights[:2] == [0.0, 1.0] for _, weights in made)


def test_batch_budget_and_seed(run):
    whole = sample(run)
    narrow = run.training.model_copy(update={"max_tokens_per_micro_batch": 16})
    wide, run.training = run.training, narrow
    try:
        assert sample(run) == whole
    finally:
        run.training = wide
    assert sample(run, seed=2) != whole


def test_the_global_generator_and_the_mode_stay_as_they_were(run):
    before, mode = torch.get_rng_state(), run.model.training
    sample(run)
    assert torch.equal(torch.get_rng_state(), before)
    assert run.model.training == mode


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_the_base_decodes_as_it_did_at_the_start_however_far_training_is(tmp_path, kind):
    run = make_run(make_plan(tmp_path, training={"type": kind}))
    at_start = sample(run, base=True)
    assert at_start == sample(run)
    assert run.teacher._copy is None  # no copy of a model that has not moved
    with torch.no_grad():
        for parameter in run.ctx.params.values():
            parameter.add_(0.3 * torch.randn_like(parameter))
    run.executed = run.step = 1
    assert sample(run, base=True) == at_start
    assert sample(run) != at_start


def test_closing_tokens_are_those_of_the_generation_settings(run):
    assert closing_tokens(run.model) == {2}
