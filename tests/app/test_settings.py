"""Settings from the environment."""

import pytest

from app.settings import Settings


@pytest.mark.parametrize(
    ("text", "queues"), [("default", ("default",)), ("big, small,", ("big", "small"))]
)
def test_queues_are_written_with_commas(
    monkeypatch: pytest.MonkeyPatch, text: str, queues: tuple[str, ...]
):
    monkeypatch.setenv("RETAIN_QUEUES", text)
    assert Settings().queues == queues
