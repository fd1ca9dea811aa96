"""Benchmark items, read once, and made into tokens once for each tokenizer and template."""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

import numpy as np

from app.domain.benchmarks import (
    GENERATION,
    ExactMatchItem,
    MultipleChoiceItem,
    NllItem,
    Scorer,
)
from app.domain.conversations import ChatRow
from app.domain.jsonlines import read_lines
from app.domain.rows import Item, Row, TextRow, iter_items
from app.domain.runplan import BenchmarkPlan
from app.errors import BadRequest, TrainingFailed
from workers.data.masks import Encoder, Ids, Weights, tokenizer_sha256
from workers.data.rendering import Frame, Renderer

ANSWER_MARGIN_TOKENS: Final = 4  # generated past the longest accepted answer, to see that it ends
KEPT_BENCHMARKS: Final = 32


@dataclass(frozen=True, slots=True)
class ChoiceItem:
    """A question and its choices as tokens."""

    context: list[int]
    choices: list[list[int]]
    answer: int


@dataclass(frozen=True, slots=True)
class QuestionItem:
    """A question as tokens, and what counts as its answer."""

    prompt: list[int]
    accepted: tuple[str, ...]
    max_tokens: int


@dataclass(frozen=True, slots=True)
class TextItem:
    """A text as tokens, with the loss weight of each as a target."""

    ids: Ids
    weights: Weights


@dataclass(frozen=True, slots=True)
class Prepared:
    """All items of a benchmark, in file order; only the list of its scorer is filled."""

    choices: tuple[ChoiceItem, ...] = ()
    questions: tuple[QuestionItem, ...] = ()
    texts: tuple[TextItem, ...] = ()
    stop_ids: frozenset[int] = frozenset()
    one_line: bool = True  # no accepted answer has a line break, so an answer ends with its line

    def __len__(self) -> int:
        return len(self.choices) + len(self.questions) + len(self.texts)


def load_items(path: Path, scorer: Scorer) -> tuple[Item, ...]:
    """The items of a benchmark file, kept in memory while the file stays as it is.

    Raises:
        TrainingFailed: A line is no item of this scorer; code `invalid_row`.
    """
    stat = path.stat()
    return _load_items(path, scorer, (stat.st_size, stat.st_mtime_ns))


class _Kept:
    """The prepared benchmarks used last, by what they depend on."""

    def __init__(self) -> None:
        self._entries: OrderedDict[tuple[str, ...], Prepared] = OrderedDict()

    def find(self, key: tuple[str, ...]) -> Prepared | None:
        if key in self._entries:
            self._entries.move_to_end(key)
        return self._entries.get(key)

    def add(self, key: tuple[str, ...], prepared: Prepared) -> None:
        self._entries[key] = prepared
        while len(self._entries) > KEPT_BENCHMARKS:
            self._entries.popitem(last=False)


_KEPT: Final = _Kept()


def prepare(
    benchmark: BenchmarkPlan,
    tokenizer: Any,  # noqa: ANN401 - transformers is untyped
    *,
    chat_template: str | None,
) -> Prepared:
    """The benchmark's items as tokens, rendered by the code that renders training rows.

    Raises:
        TrainingFailed: An item is invalid, or the template can't be used.
    """
    param = f"benchmark {benchmark.name}"
    renderer = Renderer(tokenizer, chat_template=chat_template, param=param)
    key = (
        benchmark.sha256,
        benchmark.scorer,
        tokenizer_sha256(tokenizer),
        chat_template if chat_template is not None else repr(tokenizer.chat_template),
    )
    prepared = _KEPT.find(key)
    if prepared is None:
        items = load_items(Path(benchmark.path), benchmark.scorer)
        encoder = Encoder(tokenizer, param=param)
        match benchmark.scorer:
            case scorer if scorer in GENERATION:
                asked = [item for item in items if isinstance(item, ExactMatchItem)]
                prepared = _prepare_questions(asked, renderer, encoder, tokenizer)
            case Scorer.MULTIPLE_CHOICE:
                chosen = [item for item in items if isinstance(item, MultipleChoiceItem)]
                prepared = _prepare_choices(chosen, renderer, encoder)
            case _:
                rows = [_as_row(item) for item in items if isinstance(item, NllItem)]
                rendered = [renderer.render_row(row) for row in rows]
                prepared = Prepared(texts=tuple(TextItem(*r) for r in encoder.encode(rendered)))
        _KEPT.add(key, prepared)
    return prepared


@lru_cache(maxsize=KEPT_BENCHMARKS)
def _load_items(path: Path, scorer: Scorer, _stat: tuple[int, int]) -> tuple[Item, ...]:
    try:
        with path.open("rb") as file:
            return tuple(item for _, item in iter_items(read_lines(file), scorer))
    except BadRequest as error:
        raise TrainingFailed(str(error), error.param, error.code) from error


def _prepare_choices(
    items: Sequence[MultipleChoiceItem], renderer: Renderer, encoder: Encoder
) -> Prepared:
    """A choice continues its question as an assistant's answer would; what closes the turn isn't scored."""
    if not items:
        return Prepared()
    frame, contexts = _contexts([item.question for item in items], renderer)
    lead = _blank_lead(frame)
    texts = [
        context + lead + choice
        for item, context in zip(items, contexts, strict=True)
        for choice in item.choices
    ]
    cuts = [
        [len(context)] for item, context in zip(items, contexts, strict=True) for _ in item.choices
    ]
    pieces = iter(encoder.cut_ids(texts, cuts))
    prepared = []
    for item in items:
        parts = [next(pieces) for _ in item.choices]
        prepared.append(ChoiceItem(parts[0][0], [part[1] for part in parts], item.answer))
    return Prepared(choices=tuple(prepared))


def _prepare_questions(
    items: Sequence[ExactMatchItem],
    renderer: Renderer,
    encoder: Encoder,
    tokenizer: Any,  # noqa: ANN401 - transformers is untyped
) -> Prepared:
    if not items:
        return Prepared()
    frame, contexts = _contexts([item.question for item in items], renderer)
    lead = _blank_lead(frame)
    accepted = [item.answers or (item.answer,) for item in items]
    lengths = iter(
        len(ids) for ids in encoder.ids([lead + answer for row in accepted for answer in row])
    )
    longest = [max(next(lengths) for _ in row) for row in accepted]
    prompts = encoder.ids(contexts)
    return Prepared(
        questions=tuple(
            QuestionItem(
                prompt=prompt,
                accepted=tuple(answers),
                max_tokens=item.max_tokens or most + ANSWER_MARGIN_TOKENS,
            )
            for item, prompt, answers, most in zip(items, prompts, accepted, longest, strict=True)
        ),
        stop_ids=_stop_ids(frame, encoder, tokenizer),
        one_line=not any("\n" in answer.strip() for row in accepted for answer in row),
    )


def _contexts(questions: Sequence[str], renderer: Renderer) -> tuple[Frame, list[str]]:
    """The frame of the answers, and each question as text up to where its answer begins.

    Visible text that a template puts before every answer (an empty thinking block, say) belongs to the
    context; white space is left to the answer, as tokenizers join it to the next word.
    """
    frame = renderer.answer_frame(questions[0])
    visible = "" if _blank_lead(frame) else frame.lead
    return frame, [text + visible for text in renderer.render_questions(questions)]


def _blank_lead(frame: Frame) -> str:
    return frame.lead if not frame.lead.strip() else ""


def _stop_ids(
    frame: Frame,
    encoder: Encoder,
    tokenizer: Any,  # noqa: ANN401 - transformers is untyped
) -> frozenset[int]:
    """End of text, and the special token with which the template closes an assistant turn."""
    special = set(tokenizer.all_special_ids) | set(tokenizer.get_added_vocab().values())
    closing = encoder.ids([frame.tail])[0][:1] if frame.tail else []
    return frozenset(encoder.end_ids) | {token for token in closing if token in special}


def _as_row(item: NllItem) -> Row:
    if item.text is not None:
        return TextRow(text=item.text)
    return ChatRow.model_validate({"messages": item.messages})


def supervised(item: TextItem, max_tokens: int) -> tuple[Ids, np.ndarray[Any, np.dtype[np.int64]]]:
    """Ids of a text within the context, and the columns of its targets."""
    ids, weights = item.ids[:max_tokens], item.weights[:max_tokens]
    return ids, np.flatnonzero(weights > 0)
