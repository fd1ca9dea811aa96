"""Training rows as files, for the strategy that makes counterparts of them from their text."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from app.domain.runplan import RowsPlan, RunPlan
from tests.benchmarks.board.material import Material
from workers.data.tokens import TokenStore, load_tokens
from workers.demo_model.skills import Question
from workers.training.loop import Run
from workers.training.pairs import add_pairs


def write_rows(directory: Path, name: str, questions: Sequence[Question]) -> RowsPlan:
    """A file of chat rows as a job would send it."""
    lines = []
    for question in questions:
        turns = [("user", question.prompt), ("assistant", question.answer)]
        messages = [{"role": role, "content": content} for role, content in turns]
        lines.append(json.dumps({"messages": messages}) + "\n")
    text = "".join(lines)
    path = directory / f"{name}.jsonl"
    path.write_text(text)
    return RowsPlan(path=str(path), sha256=hashlib.sha256(text.encode()).hexdigest())


def read_rows(rows: RowsPlan, plan: RunPlan, material: Material) -> TokenStore:
    """The file's rows, tokenised as a run does it."""
    return load_tokens(
        rows,
        material.tokenizer,
        chat_template=None,
        max_seq_length=plan.training.max_seq_length,
        cache_directory=Path(plan.cache_directory),
    )


def add_counterparts(plan: RunPlan, run: Run, material: Material) -> None:
    """Gives a run the counterparts that its strategy's rules make of the plan's files."""
    add_pairs(plan, run, material.tokenizer, _Silent())  # type: ignore[arg-type] # nobody listens


class _Silent:
    def note(self, *_: Any, **__: Any) -> None:
        """Says nothing."""
