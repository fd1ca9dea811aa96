"""An armed strategy: it costs nothing until a drop is confirmed, and soon holds from then on."""

import numpy as np
import pytest

from app.domain.decisions import Action, Verdict
from app.domain.policy import Policy
from tests.benchmarks.controllers.activation import draw_plant, measure, observe
from tests.benchmarks.controllers.plants import ASKED, Plant
from tests.benchmarks.controllers.runs import simulate

CONTROLLERS = ("deadband", "dual")
every_controller = pytest.mark.parametrize("controller", CONTROLLERS)


def make_policy(controller: str) -> Policy:
    return Policy.model_validate({"controller": controller})


@every_controller
@pytest.mark.parametrize("seed", range(4))
def test_it_is_off_until_the_first_confirmed_drop_and_then_at_its_default(
    controller: str, seed: int
) -> None:
    plant = draw_plant(np.random.default_rng([seed, 3]))
    run = simulate(plant, make_policy(controller), seed, armed=True)
    at = next(i for i, s in enumerate(run.steps) if s.reading.verdict is Verdict.REGRESS)
    assert all(step.strength == 0 for step in run.steps[: at + 1])
    assert all(step.decision.action is Action.KEEP for step in run.steps[:at])
    activating = run.steps[at]
    assert activating.after == ASKED
    assert "activated at 100" in activating.decision.reason
    assert min(step.after for step in run.steps[at:]) > 0  # never off again


@every_controller
def test_without_a_drop_it_is_never_activated(controller: str) -> None:
    calm = Plant("calm", "drops half the limit at strength 0", needs=1e-3, free=0.015)
    run = simulate(calm, make_policy(controller), 0, armed=True)
    assert all(step.after == 0 for step in run.steps)
    assert observe(run) is None


# Bars for these few fixed seeds; the rates themselves, with their intervals, are in CONTROLLERS.md.
@pytest.mark.parametrize(("controller", "bar"), [("deadband", 0.8), ("dual", 0.7)])
def test_from_activation_most_regressions_hold_within_two_raises(
    controller: str, bar: float
) -> None:
    found = measure(make_policy(controller), range(45), looks=10)
    assert found.n >= 40  # nearly all of these plants regress without it
    assert found.few_raises.value >= bar
