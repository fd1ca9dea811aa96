"""Tokenised rows: a flat, memory-mapped store, made once for a file, a tokenizer and a template."""

import hashlib
import itertools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from app.domain.conversations import PreferenceRow
from app.domain.jsonlines import read_lines
from app.domain.overlap import drop_overlapping, item_texts, row_texts
from app.domain.rows import TRAINING_FILE, Row, iter_items, iter_rows
from app.domain.runplan import BenchmarkPlan, RowsPlan
from app.errors import BadRequest, TrainingFailed
from workers.data.masks import Encoder, Ids, Weights, tokenizer_sha256
from workers.data.rendering import Renderer

CACHE_VERSION: Final = 2  # part of the key: raise it when rendering or masks change
CHUNK_ROWS: Final = 512
MAX_LISTED_LINES: Final = 20
_DTYPES: Final = {"I32": np.int32, "I64": np.int64, "F32": np.float32}


@dataclass(frozen=True, slots=True)
class Finding:
    """Something the owner of the file should know; `lines` lists the first 20 it applies to, from 1."""

    code: str  # `truncated_rows`, `no_supervised_tokens`, `overlaps_benchmark` or `identical_pairs`
    message: str
    count: int
    lines: tuple[int, ...]


class TokenStore:
    """Rows as flat arrays; those without a token to learn are left out.

    Args:
        input_ids: int32, all rows one after the other.
        offsets: int64, row i is `offsets[i]` to `offsets[i + 1]`.
        weights: float32 loss weight of each token as a target; 0 for the first of a row.
        lines: int64 line number of each row in its file, from 1.
        findings: What was cut or left out.
        environments: The `domain` of each row, "" where it names none; empty where no row does.
    """

    def __init__(
        self,
        *,
        input_ids: Ids,
        offsets: NDArray[np.int64],
        weights: Weights,
        lines: NDArray[np.int64],
        findings: Sequence[Finding] = (),
        environments: Sequence[str] = (),
    ) -> None:
        self.input_ids = input_ids
        self.offsets = offsets
        self.weights = weights
        self.lines = lines
        self.findings = tuple(findings)
        self.environments = tuple(environments)
        self._lengths: NDArray[np.int64] = np.diff(offsets).astype(np.int64)

    def __len__(self) -> int:
        return len(self._lengths)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each row."""
        return self._lengths

    def row(self, index: int) -> tuple[Ids, Weights]:
        """Token ids of a row and the loss weight of each token as a target."""
        part = slice(int(self.offsets[index]), int(self.offsets[index + 1]))
        return self.input_ids[part], self.weights[part]


def load_tokens(
    rows: RowsPlan,
    tokenizer: Any,  # noqa: ANN401 - transformers is untyped
    *,
    chat_template: str | None,
    max_seq_length: int,
    cache_directory: Path,
    param: str = TRAINING_FILE,
    benchmarks: Sequence[BenchmarkPlan] = (),
) -> TokenStore:
    """The tokenised rows of a file, from the cache where they are there.

    Args:
        rows: The file; its sha256 is part of the cache's key.
        tokenizer: A transformers tokenizer; its hash is part of the key.
        chat_template: Jinja text; None takes the tokenizer's own.
        max_seq_length: Longer rows are cut at the end.
        cache_directory: Where the cache lies; several processes may share it.
        param: The request field that named the file.
        benchmarks: Rows that overlap an item of one of these are left out: for general rows.

    Raises:
        TrainingFailed: A row is invalid, the template unusable, or no row has a token to learn.
    """
    renderer = Renderer(tokenizer, chat_template=chat_template, param=param)
    key = cache_key(rows, tokenizer, renderer, chat_template, max_seq_length, benchmarks)
    path = cache_directory / "tokens" / f"{key}.safetensors"
    if not path.exists():
        built = _build(Path(rows.path), renderer, tokenizer, max_seq_length, param, benchmarks)
        save_store(path, built)
    store, _ = open_store(path)
    if not len(store):
        lines = sorted({line for finding in store.findings for line in finding.lines})
        listed = ", ".join(map(str, lines)) or "none"
        raise TrainingFailed(
            f"{param}: no row has a token to learn within {max_seq_length} tokens (lines {listed}"
            f"{', ...' if len(lines) >= MAX_LISTED_LINES else ''}). Raise max_seq_length, shorten the "
            "prompts, or give assistant messages a weight.",
            param,
            "no_supervised_tokens",
        )
    return store


def cache_key(
    rows: RowsPlan,
    tokenizer: Any,  # noqa: ANN401 - transformers is untyped
    renderer: Renderer,
    chat_template: str | None,
    max_seq_length: int,
    benchmarks: Sequence[BenchmarkPlan],
) -> str:
    """What the tokens of a file follow from, as one hash."""
    has_template = chat_template is not None or tokenizer.chat_template is not None
    parts = (
        CACHE_VERSION,
        rows.sha256,
        tokenizer_sha256(tokenizer),
        renderer.template.sha256 if has_template else None,
        max_seq_length,
        sorted(benchmark.sha256 for benchmark in benchmarks),
    )
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _build(
    path: Path,
    renderer: Renderer,
    tokenizer: Any,  # noqa: ANN401 - transformers is untyped
    max_seq_length: int,
    param: str,
    benchmarks: Sequence[BenchmarkPlan],
) -> TokenStore:
    """Renders and encodes a file, a chunk of rows at a time."""
    encoder = Encoder(tokenizer, param=param)
    texts = benchmark_texts(benchmarks)
    truncated: list[int] = []
    empty: list[int] = []
    overlapping: list[int] = []
    kept: list[tuple[int, Ids, Weights]] = []
    environments: list[str] = []
    for chunk in read_chunks(path, param):
        rows = chunk
        if texts:
            positions, _ = drop_overlapping((row_texts(row) for _, row in chunk), texts)
            chosen = set(positions)
            overlapping += [line for i, (line, _) in enumerate(chunk) if i not in chosen]
            rows = [chunk[i] for i in positions]
        _refuse_pairs(rows, param)
        rendered = [renderer.render_row(row) for _, row in rows]
        for (line, row), (ids, weights) in zip(rows, encoder.encode(rendered), strict=True):
            if len(ids) > max_seq_length:
                truncated.append(line)
            if weights[:max_seq_length].any():
                kept.append((line, ids[:max_seq_length], weights[:max_seq_length]))
                environments.append(row.domain or "")
            else:
                empty.append(line)
    return TokenStore(
        input_ids=np.concatenate([ids for _, ids, _ in kept] or [np.empty(0, np.int32)]),
        offsets=np.cumsum([0, *(len(ids) for _, ids, _ in kept)], dtype=np.int64),
        weights=np.concatenate([w for _, _, w in kept] or [np.empty(0, np.float32)]),
        lines=np.asarray([line for line, _, _ in kept], np.int64),
        findings=_findings(truncated, empty, overlapping, max_seq_length),
        environments=environments if any(environments) else (),
    )


def _refuse_pairs(rows: Sequence[tuple[int, Row]], param: str) -> None:
    for line, row in rows:
        if isinstance(row, PreferenceRow):
            raise TrainingFailed(
                f"{param} line {line}: compares two answers; rows to learn from are needed here",
                param,
                "wrong_row_format",
            )


def read_chunks(path: Path, param: str) -> Iterator[list[tuple[int, Row]]]:
    """The rows of a file with their line numbers, some hundred at a time.

    Raises:
        TrainingFailed: A line is no row.
    """
    with path.open("rb") as file:
        rows = iter_rows(read_lines(file), param=param)
        while True:
            try:
                chunk = list(itertools.islice(rows, CHUNK_ROWS))
            except BadRequest as error:
                raise TrainingFailed(str(error), error.param, error.code) from error
            if not chunk:
                return
            yield chunk


def overlapping_lines(
    rows: RowsPlan, benchmarks: Sequence[BenchmarkPlan], *, param: str = TRAINING_FILE
) -> frozenset[int]:
    """Lines of a file, from 1, whose rows share text with an item of a benchmark."""
    texts = benchmark_texts(benchmarks)
    if not texts:
        return frozenset()
    lines: list[tuple[int, Row]] = []
    for chunk in read_chunks(Path(rows.path), param):
        lines += chunk
    kept, _ = drop_overlapping((row_texts(row) for _, row in lines), texts)
    return frozenset(line for line, _ in lines) - {lines[position][0] for position in kept}


def benchmark_texts(benchmarks: Sequence[BenchmarkPlan]) -> list[str]:
    """What no general row may repeat: the texts of all their items."""
    texts: list[str] = []
    for benchmark in benchmarks:
        with Path(benchmark.path).open("rb") as file:
            for _, item in iter_items(read_lines(file), benchmark.scorer):
                texts += item_texts(item)
    return texts


def _findings(
    truncated: Sequence[int], empty: Sequence[int], overlapping: Sequence[int], length: int
) -> list[Finding]:
    found = []
    for code, lines, text in (
        ("truncated_rows", truncated, f"longer than {length} tokens: cut at the end"),
        ("no_supervised_tokens", empty, f"without a token to learn in {length} tokens: left out"),
        ("overlaps_benchmark", overlapping, "sharing text with a benchmark item: left out"),
    ):
        if lines:
            message = f"{len(lines)} row{'s' if len(lines) > 1 else ''} {text}"
            found.append(Finding(code, message, len(lines), tuple(lines[:MAX_LISTED_LINES])))
    return found


def save_store(path: Path, store: TokenStore, **more: NDArray[Any]) -> None:
    """Writes the store, and arrays beside it, under a name of its own, then renames: readers see all or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    arrays: dict[str, NDArray[Any]] = {
        "offsets": store.offsets,
        "lines": store.lines,
        "input_ids": store.input_ids,
        "weights": store.weights,
        **more,
    }
    names = sorted(set(store.environments))
    if names:
        place = {name: index for index, name in enumerate(names)}
        arrays["environment_of"] = np.asarray([place[e] for e in store.environments], np.int32)
    findings = [[f.code, f.message, f.count, f.lines] for f in store.findings]
    try:
        facts = {"findings": json.dumps(findings), "environments": json.dumps(names)}
        save_file(arrays, partial, metadata=facts)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def open_store(path: Path) -> tuple[TokenStore, dict[str, NDArray[Any]]]:
    """Maps the arrays of a saved store into memory, read when they are used; the arrays beside it come, too."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header: dict[str, Any] = json.loads(file.read(size))
    facts = header.pop("__metadata__")
    findings, names = json.loads(facts["findings"]), json.loads(facts["environments"])
    arrays = {name: _map(path, 8 + size, entry) for name, entry in header.items()}
    places = arrays.pop("environment_of", np.empty(0, np.int32))
    store = TokenStore(
        input_ids=arrays.pop("input_ids"),
        offsets=arrays.pop("offsets"),
        weights=arrays.pop("weights"),
        lines=arrays.pop("lines"),
        findings=[
            Finding(code, message, count, tuple(lines)) for code, message, count, lines in findings
        ],
        environments=[names[place] for place in places],
    )
    return store, arrays


def _map(path: Path, start: int, entry: Mapping[str, Any]) -> NDArray[Any]:
    dtype = _DTYPES[entry["dtype"]]
    shape = tuple(entry["shape"])
    if 0 in shape:  # an empty mapping is an error
        return np.empty(shape, dtype)
    begin = int(entry["data_offsets"][0])
    return np.memmap(path, dtype=dtype, mode="r", offset=start + begin, shape=shape)
