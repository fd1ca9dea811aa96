"""A tiny model with its tokenizer, and benchmark files, for the tests of scoring."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from app.domain.benchmarks import BenchmarkKind, Scorer
from app.domain.digests import file_sha256
from app.domain.runplan import BenchmarkPlan
from tests.tiny import PLAIN_TEMPLATE, make_llama, make_tokenizer

WORDS = ["apple", "bear", "cat", "dog", "elk", "fox", "goat", "hen"]


class Tiny(NamedTuple):
    """A model and its tokenizer, with a chat template."""

    model: Any
    tokenizer: Any


def make_tiny(seed: int = 0) -> Tiny:
    """Weights large enough for logits that differ clearly."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = make_llama()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(4.0 if parameter.ndim > 1 else 1.0)
    tokenizer = make_tokenizer(chat_template=True)
    return Tiny(model, tokenizer)


def make_benchmark(
    path: Path, scorer: Scorer, items: Sequence[Mapping[str, Any]], name: str = "b"
) -> BenchmarkPlan:
    """Writes the items; returns the version's plan."""
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return BenchmarkPlan(
        benchmark_version_id="benchv_1",
        name=name,
        kind=BenchmarkKind.GENERAL,
        scorer=scorer,
        weight=1.0,
        max_drop=None,
        path=str(path),
        sha256=file_sha256(path),
    )


def words(k: int, seed: int) -> str:
    """`k` words that follow from the seed."""
    generator = torch.Generator().manual_seed(seed)
    return " ".join(WORDS[i] for i in torch.randint(len(WORDS), (k,), generator=generator).tolist())


def choice_items(n: int, *, one_letter: bool = False) -> list[dict[str, object]]:
    """Questions of 2 to 12 words with 2 to 5 choices of 1 to 3 words, or of one letter each."""
    return [
        {
            "id": f"q{i}",
            "question": words(2 + i % 11, i),
            "choices": [
                "abcde"[k] if one_letter else words(1 + (i + k) % 3, 1000 * i + k + 7)
                for k in range(2 + i % 4)
            ],
            "answer": i % 2,
        }
        for i in range(n)
    ]


TEMPLATE = PLAIN_TEMPLATE
