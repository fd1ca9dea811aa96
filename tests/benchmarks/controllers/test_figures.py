"""What the tables rest on: outcomes without bias, the sweep, the intervals, and contenders that do not look."""

import numpy as np
import pytest
from scipy import stats

from app.domain.policy import Policy
from app.domain.sensing import read_report
from tests.benchmarks.controllers.__main__ import main
from tests.benchmarks.controllers.evidence import Items
from tests.benchmarks.controllers.figures import mean_interval, share, summarise, sweep
from tests.benchmarks.controllers.measuring import build_block
from tests.benchmarks.controllers.pilots import CAP, OTHERS, OURS
from tests.benchmarks.controllers.plants import (
    ASKED,
    HOPELESS,
    LIMIT,
    MENDED,
    MILD,
    STEERABLE,
)

BY_NAME = {plant.name: plant for plant in (*STEERABLE, *MILD)}
RIVALS = {one.name: one for one in OTHERS}


@pytest.mark.parametrize("drop", [-0.02, 0.0, 0.03, 0.2])
def test_item_outcomes_show_the_true_drop(drop: float) -> None:
    rng = np.random.default_rng(0)
    seen = [
        read_report(Policy(), Items(np.random.default_rng(seed), 2000).sense(drop, rng))
        for seed in range(20)
    ]
    drops = [reading.drop for reading in seen if reading.drop is not None]
    errors = [reading.stderr for reading in seen if reading.stderr is not None]
    mean = np.mean(drops)
    assert abs(mean - drop) < 3.5 * np.mean(errors) / np.sqrt(len(drops))
    assert 0.6 < np.std(drops, ddof=1) / np.mean(errors) < 1.5


@pytest.mark.parametrize("plant", list(BY_NAME.values()), ids=lambda p: p.name)
def test_what_a_plant_needs_is_where_its_drop_meets_the_limit(plant) -> None:
    assert plant.settled_drop(plant.needs * ASKED) == pytest.approx(LIMIT)
    best = sweep(plant)
    assert best is not None
    assert plant.needs * ASKED * 0.8 <= best.strength <= plant.needs * ASKED * 1.1
    worse = plant.settled_accuracy(4 * plant.needs * ASKED)
    assert worse < best.accuracy


@pytest.mark.parametrize("plant", [*HOPELESS, MENDED], ids=lambda p: p.name)
def test_no_fixed_strength_holds_a_plant_that_is_beyond_it(plant) -> None:
    assert sweep(plant) is None


@pytest.mark.parametrize(("hits", "n"), [(0, 12), (12, 12), (33, 40)])
def test_a_share_has_its_clopper_pearson_interval(hits: int, n: int) -> None:
    exact = stats.binomtest(hits, n).proportion_ci(0.95, "exact")
    assert share(hits, n) == pytest.approx((hits / n, exact.low, exact.high))


def test_a_mean_has_students_interval() -> None:
    values = [0.1, 0.4, 0.2, 0.3]
    low, high = stats.t.interval(0.95, 3, loc=0.25, scale=stats.sem(values))
    assert mean_interval(values) == pytest.approx((0.25, low, high))


@pytest.mark.parametrize("name", ["prompt", "sudden"])
def test_who_does_not_look_misses_the_goal_where_dual_meets_it(name: str) -> None:
    block = build_block([OURS[1], *OTHERS], range(4), BY_NAME[name])
    ours, *others = [row.figures for row in block.rows]
    assert ours.meets_goal
    assert not any(figures.meets_goal for figures in others)
    cap, default, _ = others
    assert cap.held.value == 1.0
    assert cap.gap is not None
    assert cap.gap.low > 0.05  # it holds, and has learned little
    assert default.met is not None
    assert default.met.value == 0.0


def test_contenders_keep_to_their_rule() -> None:
    plant = BY_NAME["prompt"]
    assert {step.after for step in RIVALS["always at the cap"].run(plant, 0).steps} == {CAP}
    assert {step.after for step in RIVALS["always default"].run(plant, 0).steps} == {ASKED}
    wandering = RIVALS["random"].run(plant, 0)
    assert len({step.after for step in wandering.steps}) == len(wandering.steps)
    assert wandering == RIVALS["random"].run(plant, 0)


def test_a_job_without_a_version_has_gained_nothing() -> None:
    hopeless = OURS[0].run(HOPELESS[1], 0)
    best = sweep(BY_NAME["prompt"])
    figures = summarise([hopeless, hopeless], best)
    assert best is not None
    assert figures.gap is not None
    assert figures.gap.value == pytest.approx(best.accuracy - 0.4)
    assert (figures.held.value, figures.could_not_hold, figures.meets_goal) == (0.0, 1.0, False)


def test_the_command_writes_the_page_of_the_plants_asked_for(tmp_path) -> None:
    asked = ["--jobs", "2", "--activations", "2", "--plant", "prompt", "--plant", "rate"]
    main([*asked, "--out", str(tmp_path / "page.md")])
    page = (tmp_path / "page.md").read_text()
    assert "Written by `python -m tests.benchmarks.controllers --jobs 2" in page
    assert "## prompt: answers within two looks" in page
    assert "## sudden" not in page
    assert "No fixed strength holds." in page
    row = next(line for line in page.splitlines() if line.startswith("| **dual** | 100 ["))
    assert row.count("|") == 11
