"""Tokenised pairs of answers: two stores whose rows belong together, made once for a file, tokenizer and template."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from app.domain.conversations import PreferenceRow
from app.domain.rows import TRAINING_FILE
from app.domain.runplan import RowsPlan
from app.errors import TrainingFailed
from workers.data.masks import Encoder, Ids, Weights
from workers.data.rendering import Renderer
from workers.data.tokens import (
    MAX_LISTED_LINES,
    Finding,
    TokenStore,
    cache_key,
    open_store,
    read_chunks,
    save_store,
)

Side = tuple[Ids, Weights]


@dataclass(frozen=True)
class PairTokens:
    """Row i of `chosen` and row i of `rejected` answer the same conversation; the first one is preferred."""

    chosen: TokenStore
    rejected: TokenStore

    def __len__(self) -> int:
        return len(self.chosen)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each pair's longer side."""
        return np.maximum(self.chosen.lengths, self.rejected.lengths)

    def digest(self) -> str:
        """Hash of the tokens and of what is compared of them."""
        digest = hashlib.sha256()
        for store in (self.chosen, self.rejected):
            for array in (store.offsets, store.input_ids, store.weights):
                digest.update(repr((array.dtype.str, array.shape)).encode())
                digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()


def load_pair_tokens(
    rows: RowsPlan,
    tokenizer: Any,  # noqa: ANN401 - transformers is untyped
    *,
    chat_template: str | None,
    max_seq_length: int,
    cache_directory: Path,
    param: str = TRAINING_FILE,
) -> PairTokens:
    """The tokenised pairs of a file, from the cache where they are there; each side is cut at the end.

    Pairs that say nothing are left out: of which a side has no token to compare, or whose sides are the same.

    Raises:
        TrainingFailed: A row is invalid or no pair, the template unusable, or no pair is left.
    """
    renderer = Renderer(tokenizer, chat_template=chat_template, param=param)
    key = cache_key(rows, tokenizer, renderer, chat_template, max_seq_length, ())
    paths = [
        cache_directory / "tokens" / f"{key}.{side}.safetensors" for side in ("rejected", "chosen")
    ]
    if not all(path.exists() for path in paths):
        built = _build(Path(rows.path), renderer, tokenizer, max_seq_length, param)
        save_store(paths[0], built.rejected)
        save_store(paths[1], built.chosen)
    rejected, chosen = (open_store(path)[0] for path in paths)
    if not len(chosen):
        raise TrainingFailed(
            f"{param}: no pair has two different answers within {max_seq_length} tokens. Raise max_seq_length,"
            " or shorten the conversations before the answers.",
            param,
            "no_supervised_tokens",
        )
    return PairTokens(chosen, rejected)


def _build(
    path: Path,
    renderer: Renderer,
    tokenizer: Any,  # noqa: ANN401 - transformers is untyped
    max_seq_length: int,
    param: str,
) -> PairTokens:
    encoder = Encoder(tokenizer, param=param)
    truncated: list[int] = []
    empty: list[int] = []
    same: list[int] = []
    kept: list[tuple[int, Side, Side, str]] = []
    for chunk in read_chunks(path, param):
        pairs = [(line, _as_pair(row, line, param)) for line, row in chunk]
        rendered = [
            renderer.render_row(side) for _, row in pairs for side in (row.preferred, row.rejected)
        ]
        encoded = encoder.encode(rendered)
        for (line, row), first, second in zip(pairs, encoded[::2], encoded[1::2], strict=True):
            if max(len(first[0]), len(second[0])) > max_seq_length:
                truncated.append(line)
            chosen, rejected = _cut(first, max_seq_length), _cut(second, max_seq_length)
            if not (chosen[1].any() and rejected[1].any()):
                empty.append(line)
            elif np.array_equal(chosen[0], rejected[0]):
                same.append(line)
            else:
                kept.append((line, chosen, rejected, row.domain or ""))
    findings = _findings(truncated, empty, same, max_seq_length)
    lines = [line for line, *_ in kept]
    environments = [environment for *_, environment in kept]
    return PairTokens(
        _store([chosen for _, chosen, _, _ in kept], lines, environments, findings),
        _store([rejected for _, _, rejected, _ in kept], lines, environments, ()),
    )


def _as_pair(row: object, line: int, param: str) -> PreferenceRow:
    if not isinstance(row, PreferenceRow):
        raise TrainingFailed(
            f"{param} line {line}: is no pair of answers, and the job's method is 'dpo'",
            param,
            "wrong_row_format",
        )
    return row


def _cut(side: Side, length: int) -> Side:
    return side[0][:length], side[1][:length]


def _store(
    sides: Sequence[Side],
    lines: Sequence[int],
    environments: Sequence[str],
    findings: Sequence[Finding],
) -> TokenStore:
    return TokenStore(
        input_ids=np.concatenate([ids for ids, _ in sides] or [np.empty(0, np.int32)]),
        offsets=np.cumsum([0, *(len(ids) for ids, _ in sides)], dtype=np.int64),
        weights=np.concatenate([w for _, w in sides] or [np.empty(0, np.float32)]),
        lines=np.asarray(lines, np.int64),
        findings=findings,
        environments=environments if any(environments) else (),
    )


def _findings(
    truncated: Sequence[int], empty: Sequence[int], same: Sequence[int], length: int
) -> list[Finding]:
    found = []
    for code, lines, text in (
        ("truncated_rows", truncated, f"longer than {length} tokens: cut at the end"),
        ("no_supervised_tokens", empty, f"without an answer in {length} tokens: left out"),
        ("identical_pairs", same, f"whose answers are the same in {length} tokens: left out"),
    ):
        if lines:
            message = f"{len(lines)} pair{'s' if len(lines) > 1 else ''} {text}"
            found.append(Finding(code, message, len(lines), tuple(lines[:MAX_LISTED_LINES])))
    return found
