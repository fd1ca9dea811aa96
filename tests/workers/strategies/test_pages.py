"""Every strategy has a page that says what it does, when to use it, what it costs, and each of its knobs."""

from pathlib import Path
from typing import get_args

import pytest

from app.domain.strategies import CARDS, StrategyConfig

METHODS = Path(__file__).parents[3] / "workers" / "strategies" / "methods"
HEADINGS = (
    "What it does",
    "When to use it",
    "Cost",
    "Knobs",
    "What it reports",
    "Limits",
    "Source",
)
CONFIGS = {
    str(config.model_fields["type"].default): config
    for config in get_args(get_args(StrategyConfig)[0])
}


def test_every_strategy_has_a_card_and_a_page() -> None:
    pages = {path.stem for path in METHODS.glob("*.md")}
    code = {path.stem for path in METHODS.glob("*.py")} - {"__init__"}
    assert set(CONFIGS) == set(CARDS) == pages == code


@pytest.mark.parametrize("kind", sorted(CONFIGS))
def test_a_page_answers_every_question(kind: str) -> None:
    lines = (METHODS / f"{kind}.md").read_text().splitlines()
    assert lines[0] == f"# {kind}"
    assert [line.removeprefix("## ") for line in lines if line.startswith("## ")] == list(HEADINGS)
    knobs = "\n".join(lines[lines.index("## Knobs") : lines.index("## What it reports")])
    missing = [
        name
        for name in CONFIGS[kind].model_fields
        if name not in {"type", "armed"} and f"`{name}`" not in knobs
    ]
    assert not missing
