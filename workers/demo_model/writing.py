"""What the demo's directory holds: rows, benchmarks, domains, and the file that describes them."""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from random import Random
from typing import Any

from app.domain.benchmarks import split_items
from workers.demo_model.domains import DOMAINS, Domain, draw_new, draw_note
from workers.demo_model.skills import GENERATORS, SEEN, UNSEEN, Question, Questions, Sample

FORMAT = 2  # of demo.json and all it names; a directory of another format is built again
NUM_STEPS = 800  # of pre-training
MIN_HALF_ITEMS = 2000  # gate items, and report items, of a general benchmark
MIN_UNSEEN_REPORT_ITEMS = 1000
ITEMS_A_SEEN_SKILL, ITEMS_AN_UNSEEN_SKILL = 550, 1100
PRETRAINING_ROWS_A_SKILL = 2300
NUM_NOTES = 4000
GENERAL_ROWS_A_SKILL = 500
TRAIN_ROWS, VALIDATION_ROWS, DOMAIN_ITEMS = 960, 160, 500
MAX_ANSWER_TOKENS = 8

Json = dict[str, Any]


def draw_all(seed: int) -> tuple[list[Sample], dict[str, list[Json]]]:
    """Pre-training samples, and the lines of every data file by path.

    The benchmarks ask the same questions in three ways; no prompt of theirs is in the samples or in a
    file of rows.
    """
    rng = Random(seed)
    questions = Questions(rng)
    files: dict[str, list[Json]] = {}
    asked = {
        skill: questions.draw(
            skill, ITEMS_AN_UNSEEN_SKILL if skill in UNSEEN else ITEMS_A_SEEN_SKILL
        )
        for skill in GENERATORS
    }
    files["benchmarks/multiple_choice.jsonl"] = list(_items("mc", asked, _multiple_choice))
    files["benchmarks/exact_match.jsonl"] = list(_items("em", asked, _exact_match))
    files["benchmarks/nll.jsonl"] = list(_items("nll", asked, _nll))
    for lines in files.values():
        _check_halves([line["id"] for line in lines])
    general = [q for skill in SEEN for q in questions.draw(skill, GENERAL_ROWS_A_SKILL)]
    rng.shuffle(general)
    files["general.jsonl"] = [_chat(q) for q in general]
    samples = [
        Sample(q.prompt, q.answer)
        for skill in GENERATORS
        for q in questions.draw(skill, PRETRAINING_ROWS_A_SKILL)
    ]
    samples += [Sample(draw_note(rng), None) for _ in range(NUM_NOTES)]
    for domain in DOMAINS:
        files |= _domain_files(domain, rng)
    return samples, files


def describe(seed: int, num_steps: int, directory: Path, paths: Iterable[str]) -> Json:
    """The content of demo.json; paths are relative to the directory."""
    return {
        "format": FORMAT,
        "seed": seed,
        "steps": num_steps,
        "model": "model",
        "general_data": "general.jsonl",
        "benchmarks": [
            {
                "name": f"demo-{scorer.replace('_', '-')}",
                "file": f"benchmarks/{scorer}.jsonl",
                "kind": "general",
                "scorer": scorer,
                "weight": 1.0,
            }
            for scorer in ("multiple_choice", "exact_match", "nll")
        ],
        "skills": {"seen": list(SEEN), "unseen": list(UNSEEN)},
        "domains": {
            domain.name: {
                "train": f"{domain.name}/train.jsonl",
                "validation": f"{domain.name}/validation.jsonl",
                "labels": list(domain.phrases),
                "benchmarks": [
                    {
                        "name": f"demo-{domain.name}-{short}",
                        "file": f"benchmarks/{domain.name}_{scorer}.jsonl",
                        "kind": "domain",
                        "scorer": scorer,
                        "weight": 1.0,
                    }
                    for short, scorer in (("mc", "multiple_choice"), ("em", "exact_match"))
                ],
            }
            for domain in DOMAINS
        },
        "files": {path: _digest(directory / path) for path in sorted(paths)},
    }


def is_complete(directory: Path, seed: int, num_steps: int) -> bool:
    """Whether the directory holds all of this format, seed and number of steps, byte for byte."""
    try:
        described = json.loads((directory / "demo.json").read_text())
        return (
            described["format"] == FORMAT
            and described["seed"] == seed
            and described["steps"] == num_steps
            and all(
                _digest(directory / path) == digest for path, digest in described["files"].items()
            )
        )
    except (FileNotFoundError, KeyError, json.JSONDecodeError):
        return False


def write_lines(path: Path, lines: Iterable[Json]) -> None:
    """JSON lines, keys in the order given."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for line in lines:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def _domain_files(domain: Domain, rng: Random) -> dict[str, list[Json]]:
    used: set[str] = set()
    train = draw_new(domain, TRAIN_ROWS, rng, used)
    validation = draw_new(domain, VALIDATION_ROWS, rng, used)
    asked = {domain.name: draw_new(domain, DOMAIN_ITEMS, rng, used)}
    return {
        f"{domain.name}/train.jsonl": [_chat(q) for q in train],
        f"{domain.name}/validation.jsonl": [_chat(q) for q in validation],
        f"benchmarks/{domain.name}_multiple_choice.jsonl": list(
            _items("mc", asked, _multiple_choice)
        ),
        f"benchmarks/{domain.name}_exact_match.jsonl": list(_items("em", asked, _exact_match)),
    }


def _items(
    kind: str, asked: dict[str, list[Question]], item: Callable[[Question], Json]
) -> Iterable[Json]:
    for skill, questions in asked.items():
        group = "seen" if skill in SEEN else "unseen" if skill in UNSEEN else "domain"
        for number, question in enumerate(questions):
            yield (
                {"id": f"{group}-{skill}-{kind}-{number:04d}"} | item(question) | {"subject": skill}
            )


def _multiple_choice(question: Question) -> Json:
    return {
        "question": question.prompt,
        "choices": list(question.choices),
        "answer": question.choices.index(question.answer),
    }


def _exact_match(question: Question) -> Json:
    return {
        "question": question.prompt,
        "answer": question.answer,
        "max_tokens": MAX_ANSWER_TOKENS,
    }


def _nll(question: Question) -> Json:
    return _chat(question)


def _chat(question: Question) -> Json:
    return {
        "messages": [
            {"role": "user", "content": question.prompt},
            {"role": "assistant", "content": question.answer},
        ]
    }


def _check_halves(ids: Sequence[str]) -> None:
    """Ids do not depend on the seed, so this holds for every seed or for none."""
    gate, report = split_items(ids, len(ids))
    unseen = sum(ids[i].startswith("unseen-") for i in report)
    if min(len(gate), len(report)) < MIN_HALF_ITEMS or unseen < MIN_UNSEEN_REPORT_ITEMS:
        raise RuntimeError(
            f"{len(gate)} gate and {len(report)} report items, {unseen} of them unseen: too few"
        )


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
