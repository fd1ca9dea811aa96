"""Random faults on a fleet of real workers, judged by a checker of its own; and mutants, which it has to catch."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.conftest import Servers
from tests.faults.fleet import measured
from tests.faults.nemesis.nursery import Nursery
from tests.faults.nemesis.runs import run_seed

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def nursery(own_servers: Servers) -> Iterator[Nursery]:
    nursery = Nursery(own_servers.redis_url)
    yield nursery
    nursery.close()


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_no_promise_is_broken_whatever_the_nemesis_does(
    own_servers: Servers, nursery: Nursery, tmp_path: Path, seed: int
):
    run = run_seed(own_servers, nursery, tmp_path / "run", seed)
    measured("nemesis", **run.figures)
    assert run.violations == []
    assert set(run.history.states) <= {"succeeded", "cancelled"}
    assert run.faults.total() >= 10


def test_workers_that_forget_the_fence_are_caught(
    own_servers: Servers, nursery: Nursery, tmp_path: Path
):
    rules: set[str] = set()
    for seed in (4, 5, 6):
        run = run_seed(own_servers, nursery, tmp_path / f"run-{seed}", seed, unfenced=True)
        measured("nemesis without the fence", **run.figures)
        rules = {violation.rule for violation in run.violations}
        if "fence" in rules:
            break
    assert "fence" in rules
