"""The learning rate's curve against transformers' schedulers."""

import pytest
import torch
from transformers import get_scheduler

from tests.workers.training.runs import make_training
from workers.training.schedule import learning_rate_factor


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
def test_after_the_warm_up_the_curve_is_that_of_transformers(kind):
    training = make_training(total_steps=50, warmup_ratio=0.1, lr_scheduler=kind)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    name = "constant_with_warmup" if kind == "constant" else kind
    scheduler = get_scheduler(name, optimizer, num_warmup_steps=5, num_training_steps=50)
    for step in range(50):
        factor = learning_rate_factor(training, step)
        if step >= 5:
            assert factor == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-12)
        assert 0 < factor <= 1
        optimizer.step()
        scheduler.step()


def test_the_warm_up_rises_in_equal_steps_and_the_first_already_moves():
    training = make_training(total_steps=100, warmup_ratio=0.03)
    factors = [learning_rate_factor(training, step) for step in range(4)]
    assert factors == pytest.approx([0.25, 0.5, 0.75, 1.0])


def test_without_a_warm_up_the_first_step_is_at_the_full_rate():
    assert learning_rate_factor(make_training(warmup_ratio=0.0), 0) == 1.0
