"""The published artifact."""

from pathlib import Path
from typing import Any

from torch import nn

from app.domain.runplan import BasePlan


def write_artifact(
    model: nn.Module,
    tokenizer: Any,  # noqa: ANN401 - transformers has no types
    directory: Path,
    *,
    base: BasePlan,
    job_id: str,
    alpha: float,
    is_lora: bool,
) -> Path:
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory
