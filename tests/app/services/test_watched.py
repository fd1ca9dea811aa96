"""What a project requires: no job switches it off, loosens it or weighs it away."""

import pytest
from sqlalchemy.orm import Session

from app.domain.benchmarks import BenchmarkKind, Scorer
from app.domain.spec import JobSpec
from app.errors import BadRequest, NotFound
from app.services.watched import list_required, release_benchmark, require_benchmark
from tests.app.services.test_jobs import Stand
from tests.factories import make_benchmark, make_project, make_second_version, make_suite


@pytest.fixture
def stand(session: Session) -> Stand:
    return Stand(session)


def policy_of(job):
    return JobSpec.model_validate(job.spec).policy


def watched_of(job) -> dict[str, tuple[float, float | None]]:
    policy = policy_of(job)
    return {each.name: (each.weight, each.max_drop) for each in policy.benchmarks or ()}


def test_a_required_benchmark_stays_whatever_the_job_says(stand: Stand) -> None:
    safety = make_benchmark(stand.session, name="safety")
    suite = make_benchmark(stand.session, name="suite")
    make_suite(stand.session, stand.base, [suite])
    require_benchmark(stand.session, stand.project.id, "safety", weight=2.0, limit=0.02)
    assert watched_of(stand.submit()) == {"suite@1": (1.0, None), "safety@1": (2.0, 0.02)}
    named = {"retention": {"policy": {"max_drop": 0.9, "benchmarks": [{"name": "suite"}]}}}
    assert watched_of(stand.submit(**named)) == {"suite@1": (1.0, None), "safety@1": (2.0, 0.02)}
    none: dict[str, object] = {"retention": {"policy": {"benchmarks": []}}}
    assert watched_of(stand.submit(**none)) == {"safety@1": (2.0, 0.02)}
    assert safety.version == 1


def test_with_retention_off_it_is_watched_and_the_job_says_so(stand: Stand) -> None:
    make_benchmark(stand.session, name="safety")
    optional, bound = (make_benchmark(stand.session, name=name) for name in ("opt", "bound"))
    make_suite(stand.session, stand.base, [optional])
    make_suite(stand.session, stand.base, [bound], is_mandatory=True)
    require_benchmark(stand.session, stand.project.id, "safety")
    job = stand.submit(retention=None)
    spec = JobSpec.model_validate(job.spec)
    assert watched_of(job) == {"bound@1": (1.0, None), "safety@1": (1.0, 0.03)}
    assert spec.strategies == ()
    assert not spec.is_unwatched_by_wish
    assert spec.policy is not None
    assert not spec.policy.early_stopping.enabled
    warning = next(each for each in job.warnings if each["code"] == "benchmarks_mandatory")
    assert warning["param"] == "retention"
    assert "bound@1, safety@1" in warning["message"]
    other = make_project(stand.session)
    mine, stand.project = stand.project, other
    file, stand.file = stand.file, type(stand)(stand.session).file
    stand.file.project_id = other.id
    stand.session.flush()
    assert watched_of(stand.submit(retention=None)) == {"bound@1": (1.0, None)}
    stand.project, stand.file = mine, file
    release_benchmark(stand.session, stand.project.id, "safety")
    assert watched_of(stand.submit(retention=None)) == {"bound@1": (1.0, None)}


def test_without_anything_required_retention_off_is_off(stand: Stand) -> None:
    make_suite(stand.session, stand.base, [make_benchmark(stand.session)])
    job = stand.submit(retention=None)
    assert policy_of(job) is None
    assert JobSpec.model_validate(job.spec).is_unwatched_by_wish


@pytest.mark.parametrize(
    ("wish", "weight", "max_drop"),
    [
        ({"weight": 0.001, "max_drop": 0.9}, 1.0, 0.03),
        ({"weight": 5.0, "max_drop": 0.01}, 5.0, 0.01),
        ({}, 1.0, 0.03),
    ],
)
def test_a_job_can_only_be_stricter(stand: Stand, wish, weight, max_drop) -> None:
    make_benchmark(stand.session, name="safety")
    require_benchmark(stand.session, stand.project.id, "safety")
    job = stand.submit(retention={"policy": {"benchmarks": [{"name": "safety"} | wish]}})
    assert watched_of(job) == {"safety@1": (weight, max_drop)}


def test_a_required_nll_bounds_the_policys_increase(stand: Stand) -> None:
    make_benchmark(stand.session, name="text", scorer=Scorer.NLL)
    require_benchmark(stand.session, stand.project.id, "text", limit=0.02)
    loose = stand.submit(retention={"policy": {"max_nll_increase": 5.0}})
    assert policy_of(loose).max_nll_increase == 0.02
    strict = stand.submit(retention={"policy": {"max_nll_increase": 0.01}})
    assert policy_of(strict).max_nll_increase == 0.01
    assert watched_of(strict) == {"text@1": (1.0, None)}


def test_a_newer_version_takes_the_place_of_an_older_one(stand: Stand) -> None:
    first = make_benchmark(stand.session, name="safety")
    require_benchmark(stand.session, stand.project.id, "safety")
    make_second_version(stand.session, first)
    require_benchmark(stand.session, stand.project.id, "safety")
    found = list_required(stand.session, stand.project.id)
    assert [each.benchmark.reference for each in found] == ["safety@2"]


def test_what_cannot_be_required_is_refused(stand: Stand) -> None:
    make_benchmark(stand.session, name="skill", kind=BenchmarkKind.DOMAIN)
    make_benchmark(stand.session, name="safety")
    theirs = make_project(stand.session)
    make_benchmark(stand.session, theirs, name="theirs")
    project = stand.project.id
    for reference in ("nope", "safety@7", "theirs"):
        with pytest.raises(NotFound):
            require_benchmark(stand.session, project, reference)
    with pytest.raises(BadRequest) as error:
        require_benchmark(stand.session, project, "skill")
    assert error.value.param == "benchmark"
    for limit in (0.0, 1.0, -1.0, float("nan")):
        with pytest.raises(BadRequest) as error:
            require_benchmark(stand.session, project, "safety", limit=limit)
        assert error.value.param == "max_drop"
    with pytest.raises(BadRequest) as error:
        require_benchmark(stand.session, project, "safety", weight=0.0)
    assert error.value.param == "weight"
    with pytest.raises(NotFound):
        release_benchmark(stand.session, project, "safety")
    assert list_required(stand.session, project) == []


def test_what_must_rise_is_pinned_with_its_gain(stand: Stand) -> None:
    make_benchmark(stand.session, name="skill", kind=BenchmarkKind.DOMAIN)
    wish = {"name": "skill", "expect": "rise", "min_gain": 0.1}
    job = stand.submit(retention={"policy": {"benchmarks": [wish], "on_no_gain": "refuse"}})
    policy = policy_of(job)
    assert policy.on_no_gain == "refuse"
    (pinned,) = policy.benchmarks
    assert (pinned.name, pinned.expect, pinned.min_gain) == ("skill@1", "rise", 0.1)
    assert "retention_unwatched" in [each["code"] for each in job.warnings]
