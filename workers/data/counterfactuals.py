"""Counterparts of training rows: proposals, the filters they pass, and a tokenised store made once."""

import hashlib
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from app.domain.conversations import ChatRow
from app.domain.rows import CompletionRow, Row, TextRow, counterpart
from app.domain.runplan import RowsPlan
from workers.data.masks import Encoder, Ids, Weights, tokenizer_sha256
from workers.data.rendering import Renderer
from workers.data.rewording import build_rules
from workers.data.tokens import TokenStore, open_store, read_chunks, save_store

PAIRS_VERSION: Final = 1  # part of the key: raise it when rules or filters change
LENGTH_RATIO: Final = (0.5, 2.0)
_NEGATION: Final = re.compile(
    r"n't\b|\b(?:not|no|never|none|nobody|nothing|neither|nor|cannot|without)\b", re.IGNORECASE
)
_DIGITS: Final = re.compile(r"\d+(?:[.,]\d+)*")

Encoded = tuple[Ids, Weights]
Propose = Callable[[Sequence[Row], Sequence[int]], list[list[Row]]]  # rows and their lines


@dataclass(frozen=True)
class Maker:
    """Where counterparts come from.

    Args:
        key: All that decides what is proposed: part of the cache's key.
        propose: Proposals for each row, possibly none.
        nats: Mean loss of tokenised rows under the base; of several proposals that pass, the one with the
            highest is kept. None: the first.
        keeps_numbers: Whether a proposal with other numbers in its question is refused.
    """

    key: str
    propose: Propose
    nats: Callable[[Sequence[Encoded]], Sequence[float]] | None = None
    keeps_numbers: bool = False


@dataclass(frozen=True)
class PairStore:
    """Counterparts as a store of rows of their own.

    Args:
        store: The counterparts.
        row_of: int64, by training row: its counterpart's place in `store`; -1: none.
        digest: Of the key: which pairs these are.
        refused: How many proposals each filter refused.
    """

    store: TokenStore
    row_of: NDArray[np.int64]
    digest: str
    refused: Mapping[str, int]


def rule_maker(rules: Sequence[str], groups: Sequence[Sequence[str]], seed: int) -> Maker:
    """Seeded rewordings by rules; the same row on the same line is always reworded alike."""
    chosen = build_rules(rules, groups)

    def propose_one(row: Row, line: int) -> list[Row]:
        parts = question_parts(row)
        if not parts:
            return []
        digest = hashlib.sha256(f"{seed}/{line}".encode()).digest()
        rng = np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "little")))
        changed = parts
        for rule in chosen:
            changed = rule(changed, answers(row), rng)
        return [with_question(row, changed)] if changed != parts else []

    def propose(rows: Sequence[Row], lines: Sequence[int]) -> list[list[Row]]:
        return [propose_one(row, line) for row, line in zip(rows, lines, strict=True)]

    return Maker(json.dumps(["rules", list(rules), [list(g) for g in groups], seed]), propose)


def uploaded_maker() -> Maker:
    """The counterparts that rows carry."""

    def propose(rows: Sequence[Row], _: Sequence[int]) -> list[list[Row]]:
        return [[other] if (other := counterpart(row)) is not None else [] for row in rows]

    return Maker("uploaded", propose)


def load_pairs(
    rows: RowsPlan,
    training: TokenStore,
    tokenizer: Any,  # noqa: ANN401 - transformers is untyped
    maker: Maker,
    *,
    chat_template: str | None,
    max_seq_length: int,
    cache_directory: Path,
) -> PairStore:
    """The counterparts of a file's rows, from the cache where they are there.

    Args:
        rows: The file that `training` was made of.
        training: Its tokenised rows.
        tokenizer: That they were made with.
        maker: Of the counterparts.
        chat_template: Jinja text; None takes the tokenizer's own.
        max_seq_length: Counterparts are cut there, as the rows were.
        cache_directory: Where the cache lies; several processes may share it.
    """
    parts = (
        *(PAIRS_VERSION, rows.sha256, tokenizer_sha256(tokenizer), chat_template),
        *(max_seq_length, maker.key),
    )
    digest = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    path = cache_directory / "pairs" / f"{digest}.safetensors"
    if not path.exists():
        renderer = Renderer(tokenizer, chat_template=chat_template)
        builder = _Builder(training, renderer, Encoder(tokenizer), maker, max_seq_length)
        for chunk in read_chunks(Path(rows.path), "training_file"):
            builder.add(chunk)
        store, row_of = builder.finish()
        names = sorted(builder.refused)
        counts = np.asarray([builder.refused[name] for name in names], np.int64)
        save_store(
            path, store, row_of=row_of, **{f"refused/{n}": counts[[i]] for i, n in enumerate(names)}
        )
    store, arrays = open_store(path)
    refused = {
        name.removeprefix("refused/"): int(value[0])
        for name, value in arrays.items()
        if name.startswith("refused/")
    }
    return PairStore(store, np.asarray(arrays["row_of"]), digest, refused)


def question_parts(row: Row) -> list[str]:
    """The texts of a row that are not learned: turns, or the prompt; plain text has none."""
    if isinstance(row, ChatRow):
        return [m.content for m in row.messages if m.content is not None and not m.is_learned]
    return [row.prompt] if isinstance(row, CompletionRow) else []


def with_question(row: Row, parts: Sequence[str]) -> Row:
    """The row with other texts in place of its `question_parts`, and nothing but what is rendered."""
    if isinstance(row, ChatRow):
        rest = iter(parts)
        messages = tuple(
            m if m.content is None or m.is_learned else m.model_copy(update={"content": next(rest)})
            for m in row.messages
        )
        return row.model_copy(update={"messages": messages, "counterfactual": None})
    if isinstance(row, CompletionRow):
        return row.model_copy(update={"prompt": parts[0], "counterfactual": None})
    return row


def answers(row: Row) -> list[str]:
    """The texts of a row that are learned, calls of tools as JSON."""
    if isinstance(row, CompletionRow):
        return [row.completion]
    if not isinstance(row, ChatRow):
        return [row.text] if isinstance(row, TextRow) else []
    found = []
    for message in row.messages:
        if message.is_learned:
            calls = [call.model_dump(mode="json") for call in message.tool_calls or ()]
            found.append((message.content or "") + (json.dumps(calls) if calls else ""))
    return found


def refusal(row: Row, other: Row, *, is_generated: bool, keeps_numbers: bool = False) -> str | None:
    """Why a proposal is no counterpart; None where it is one.

    `answer`: the learned texts differ, or one that the question quotes is quoted no more. `duplicate`: the
    question is the same. `length`: it is under half or over twice as long. Of generated ones also
    `negation`: one side has more negations, so its label may have changed, and what differs in its label is
    never pulled together; `script`: most of its letters are of another script; `numbers`.
    """
    before, after = "\n".join(question_parts(row)), "\n".join(question_parts(other))
    own = answers(row)
    if not before:
        return "no_question"
    if own != answers(other) or any(a in before and a not in after for a in own if a.strip()):
        return "answer"
    if " ".join(before.split()) == " ".join(after.split()):
        return "duplicate"
    if not LENGTH_RATIO[0] <= len(after) / len(before) <= LENGTH_RATIO[1]:
        return "length"
    if not is_generated:
        return None
    if len(_NEGATION.findall(before)) != len(_NEGATION.findall(after)):
        return "negation"
    if _script(before) != _script(after):
        return "script"
    if keeps_numbers and Counter(_DIGITS.findall(before)) != Counter(_DIGITS.findall(after)):
        return "numbers"
    return None


class _Builder:
    """Goes through a file's rows and keeps one counterpart for each row that has one."""

    def __init__(
        self,
        training: TokenStore,
        renderer: Renderer,
        encoder: Encoder,
        maker: Maker,
        max_seq_length: int,
    ) -> None:
        self._training = training
        self._renderer = renderer
        self._encoder = encoder
        self._maker = maker
        self._max_seq_length = max_seq_length
        self._place = {int(line): index for index, line in enumerate(training.lines)}
        self._row_of = np.full(len(training), -1, np.int64)
        self._kept: list[Encoded] = []
        self._lines: list[int] = []
        self.refused: Counter[str] = Counter()

    def add(self, chunk: Sequence[tuple[int, Row]]) -> None:
        """A chunk of the file."""
        known = [(line, row) for line, row in chunk if line in self._place]
        lines = [line for line, _ in known]
        proposed = self._maker.propose([row for _, row in known], lines)
        for (line, row), others in zip(known, proposed, strict=True):
            index = self._place[line]
            passing = self._passing(row, others, self._training.row(index))
            if passing:
                best = 0
                if self._maker.nats is not None and len(passing) > 1:
                    best = int(np.argmax(self._maker.nats(passing)))
                self._row_of[index] = len(self._kept)
                self._kept.append(passing[best])
                self._lines.append(line)

    def finish(self) -> tuple[TokenStore, NDArray[np.int64]]:
        """The store, and the place of each training row's counterpart in it."""
        store = TokenStore(
            input_ids=np.concatenate([ids for ids, _ in self._kept] or [np.empty(0, np.int32)]),
            offsets=np.cumsum([0, *(len(ids) for ids, _ in self._kept)], dtype=np.int64),
            weights=np.concatenate([w for _, w in self._kept] or [np.empty(0, np.float32)]),
            lines=np.asarray(self._lines, np.int64),
        )
        return store, self._row_of

    def _passing(self, row: Row, others: Sequence[Row], own: Encoded) -> list[Encoded]:
        is_generated = self._maker.key != "uploaded"
        passing: list[Encoded] = []
        seen: set[str] = set()
        for other in others:
            why = refusal(
                row, other, is_generated=is_generated, keeps_numbers=self._maker.keeps_numbers
            )
            text = "\n".join(question_parts(other))
            if why is None and text in seen:
                why = "duplicate"
            seen.add(text)
            if why is None:
                (encoded,) = self._encoder.encode([self._renderer.render_row(other)])
                ids, weights = (
                    encoded[0][: self._max_seq_length],
                    encoded[1][: self._max_seq_length],
                )
                # What is compared are the same tokens at other places: also where rows were cut.
                if np.array_equal(_targets(ids, weights), _targets(*own)):
                    passing.append((ids, weights))
                else:
                    why = "answer"
            if why is not None:
                self.refused[why] += 1
        return passing


def _targets(ids: Ids, weights: Weights) -> Ids:
    return ids[weights > 0]


def _script(text: str) -> str:
    """The script of most of a text's letters, as Unicode names it (`LATIN`, `CYRILLIC`); "" without any."""
    scripts = Counter(
        unicodedata.name(letter, "?").split()[0] for letter in text if letter.isalpha()
    )
    return scripts.most_common(1)[0][0] if scripts else ""
