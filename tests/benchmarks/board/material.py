"""The board's models and rows: one base model a seed, its questions, its general rows and its domains."""

import dataclasses
import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.benchmarks.board.domains import DOMAINS, HardDomain, draw_mention
from workers.demo_model.domains import draw_new
from workers.demo_model.skills import GENERATORS, SEEN, UNSEEN, Question, Questions, Sample

GENERAL = "general"
Row = tuple[NDArray[np.int32], NDArray[np.float32]]


@dataclass(frozen=True)
class Sizes:
    """How much of everything a seed has."""

    pretraining_steps: int = 900
    pretraining_rows: int = 2300  # a skill
    mentions: int = 6000
    general_rows: int = 400  # a seen skill
    unseen_items: int = 400  # a skill
    seen_items: int = 60  # a skill
    training_rows: int = 480  # a domain
    validation_rows: int = 96
    domain_items: int = 200


SIZES = Sizes()


class TokenRows:
    """A store of tokenised rows in memory; the prompt carries no loss."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows = list(rows)
        self.lengths = np.asarray([len(ids) for ids, _ in rows], dtype=np.int64)

    def row(self, index: int) -> Row:
        """Token ids and the loss weight of each token as a target."""
        return self._rows[index]


@dataclass(frozen=True)
class Material:
    """All that a run of one seed needs."""

    seed: int
    directory: Path  # of the base model
    general: TokenRows  # rows of the seen skills
    training: tuple[TokenRows, ...]  # one store a domain
    training_questions: tuple[tuple[Question, ...], ...]  # what it was made of
    validation: tuple[tuple[Question, ...], ...]
    domain_items: tuple[tuple[Question, ...], ...]
    seen_items: tuple[Question, ...]
    unseen_items: tuple[Question, ...]
    tokenizer: Any


def load_material(directory: Path, seed: int, sizes: Sizes = SIZES) -> Material:
    """Questions and rows of a seed, beside its base model that `build_base` made."""
    from transformers import AutoTokenizer

    _, drawn = draw(seed, sizes)
    tokenizer = AutoTokenizer.from_pretrained(str(directory), local_files_only=True)

    def rows(questions: Sequence[Question]) -> TokenRows:
        return TokenRows([encode_row(tokenizer, q.prompt, q.answer) for q in questions])

    return Material(
        seed=seed,
        directory=directory,
        general=rows(drawn.general),
        training=tuple(rows(own) for own in drawn.training),
        training_questions=drawn.training,
        validation=drawn.validation,
        domain_items=drawn.domain_items,
        seen_items=drawn.seen_items,
        unseen_items=drawn.unseen_items,
        tokenizer=tokenizer,
    )


def encode_row(tokenizer: Any, prompt: str, answer: str) -> Row:
    """A chat row as training renders it: loss on the answer and its end."""
    head, whole = _render(tokenizer, prompt, answer)
    weights = np.ones(len(whole), np.float32)
    weights[: len(head)] = 0.0
    return np.asarray(whole, np.int32), weights


def _render(tokenizer: Any, prompt: str, answer: str) -> tuple[list[int], list[int]]:
    turns = [{"role": "user", "content": prompt}]
    head = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    turns.append({"role": "assistant", "content": answer})
    whole = tokenizer.apply_chat_template(turns, tokenize=False)
    return (
        tokenizer(head, add_special_tokens=False)["input_ids"],
        tokenizer(whole, add_special_tokens=False)["input_ids"],
    )


@dataclass(frozen=True)
class Drawn:
    """The questions of a seed; no prompt comes twice among a skill's or a domain's."""

    general: tuple[Question, ...]
    training: tuple[tuple[Question, ...], ...]
    validation: tuple[tuple[Question, ...], ...]
    domain_items: tuple[tuple[Question, ...], ...]
    seen_items: tuple[Question, ...]
    unseen_items: tuple[Question, ...]


def draw(seed: int, sizes: Sizes = SIZES) -> tuple[list[Sample], Drawn]:
    """Pre-training samples and questions; items are in none of the rows."""
    rng = Random(seed)
    questions = Questions(rng)
    unseen = [q for skill in UNSEEN for q in questions.draw(skill, sizes.unseen_items)]
    seen = [q for skill in SEEN for q in questions.draw(skill, sizes.seen_items)]
    general = [q for skill in SEEN for q in questions.draw(skill, sizes.general_rows)]
    rng.shuffle(general)
    samples = [
        Sample(q.prompt, q.answer)
        for skill in GENERATORS
        for q in questions.draw(skill, sizes.pretraining_rows)
    ]
    samples += [draw_mention(rng) for _ in range(sizes.mentions)]
    parts = [_draw_domain(domain, rng, sizes) for domain in DOMAINS]
    training, validation, items = zip(*parts, strict=True)
    return samples, Drawn(
        tuple(general), tuple(training), tuple(validation), tuple(items), tuple(seen), tuple(unseen)
    )


def _draw_domain(
    domain: HardDomain, rng: Random, sizes: Sizes
) -> tuple[tuple[Question, ...], tuple[Question, ...], tuple[Question, ...]]:
    used: set[str] = set()
    counts = (sizes.training_rows, sizes.validation_rows, sizes.domain_items)
    training, validation, items = (tuple(draw_new(domain, n, rng, used)) for n in counts)
    return training, validation, items


def base_directory(root: Path, seed: int, fingerprint: str, sizes: Sizes = SIZES) -> Path:
    """Where the base model of a seed lies; its name changes with all that it is made of."""
    described = json.dumps({"code": fingerprint, **dataclasses.asdict(sizes)}, sort_keys=True)
    digest = hashlib.sha256(described.encode()).hexdigest()[:12]
    return root / f"base-{seed}-{digest}"


def build_base(
    directory: Path, seed: int, report: Callable[[int, int, float, float], None], sizes: Sizes
) -> None:
    """Pre-trains the base model of a seed, unless it is there already."""
    from workers.demo_model import pretraining

    if directory.exists():
        return
    samples, _ = draw(seed, sizes)
    model, tokenizer = pretraining.pretrain(
        samples, seed, report, num_steps=sizes.pretraining_steps
    )
    directory.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
    pretraining.save(model, tokenizer, scratch)
    try:
        scratch.rename(directory)
    except OSError:  # another process was first
        shutil.rmtree(scratch)
