"""What a monitor is asked for with, and what makes posted results the same."""

from datetime import UTC, datetime, timedelta

import pytest
from pydantic import ValidationError

from app.domain.monitors import CreateMonitor, UpdateMonitor, digest_results, is_too_old
from app.domain.results import PostedResult

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def result(**changes: object) -> PostedResult:
    body = {
        "subject": {"type": "model", "id": "ft:m"},
        "benchmark": "mc",
        "value": 0.5,
        "n_samples": 10,
    }
    return PostedResult.model_validate(body | changes)


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"model": "bot"}, "model"),
        ({"model": "bot@3", "sources": ("a",)}, "model"),
        ({"model": "bot@live"}, "sources"),
        ({"model": "bot@live", "sources": ("schedule",)}, "schedule"),
        ({"model": "bot@live", "sources": ("a", "a")}, "twice"),
        ({"model": "bot@live", "sources": ("",)}, "sources"),
        ({"model": "bot@live", "schedule": {"every_hours": 0}}, "every_hours"),
        ({"model": "bot@live", "sources": ("a",), "benchmarks": ()}, "benchmarks"),
        ({"model": "bot@live", "sources": ("a",), "limits": {"max_drop": 0}}, "max_drop"),
        ({"model": "bot@live", "sources": ("a",), "stale_after_hours": -1}, "stale_after_hours"),
    ],
)
def test_what_is_no_monitor_is_refused(fields, word) -> None:
    with pytest.raises(ValidationError, match=word):
        CreateMonitor.model_validate(fields)


def test_an_update_is_checked_as_well() -> None:
    with pytest.raises(ValidationError, match="schedule"):
        UpdateMonitor(sources=("schedule",))
    assert UpdateMonitor().model_fields_set == set()


def test_the_same_results_have_one_digest_in_whatever_order() -> None:
    one, two = result(), result(benchmark="em")
    digest = digest_results("ft:m", "ci", [one, two])
    assert digest == digest_results("ft:m", "ci", [two, one])
    by_alias = result(subject={"type": "model", "id": "bot@live"})
    assert digest == digest_results("ft:m", "ci", [by_alias, two])
    for other in (
        digest_results("ft:m", "ci", [one]),
        digest_results("ft:m", "other", [one, two]),
        digest_results("ft:n", "ci", [one, two]),
        digest_results("ft:m", "ci", [result(value=0.51), two]),
        digest_results("ft:m", "ci", [result(measured_at="2026-01-01T00:00:00Z"), two]),
    ):
        assert other != digest


@pytest.mark.parametrize(
    ("age", "limit", "too_old"),
    [(2, 1.0, True), (1, 1.0, False), (2, None, False), (None, 1.0, False)],
)
def test_a_result_grows_old(age, limit, too_old) -> None:
    measured_at = None if age is None else NOW - timedelta(hours=age)
    assert is_too_old(measured_at, NOW, limit) is too_old


def test_a_time_without_an_offset_is_refused() -> None:
    with pytest.raises(ValidationError, match="offset"):
        result(measured_at="2026-01-01T00:00:00")
