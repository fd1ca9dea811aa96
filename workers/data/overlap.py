"""Which general rows share text with a benchmark: such rows would teach the test."""

import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Final

from app.domain.benchmarks import ExactMatchItem, MultipleChoiceItem
from app.domain.rows import ChatRow, CompletionRow, Item, Row

NGRAM_WORDS: Final = 13  # the length that GPT-3's and later decontaminations use
_WORDS = re.compile(r"[^\W_]+")
# Scripts written without spaces would be one word a sentence: each of their characters counts as a word.
_UNSPACED = re.compile(r"([\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\u0e00-\u0e7f])")


def drop_overlapping(
    rows_texts: Iterable[Sequence[str]], benchmark_texts: Iterable[str]
) -> tuple[list[int], int]:
    """Rows that share no text with a benchmark.

    A row overlaps when one of its texts equals a benchmark's text after normalisation, or shares 13
    consecutive words with one. Texts without any letter or digit are compared as they are.

    Args:
        rows_texts: The texts of each row: turns, prompt and completion, or the text.
        benchmark_texts: Questions, with their choices where there are some.

    Returns:
        Positions of the rows to keep, and how many were dropped.
    """
    exact: set[str] = set()
    ngrams: set[tuple[str, ...]] = set()
    for text in benchmark_texts:
        words = _words(text)
        exact.add(" ".join(words) or text.strip())
        ngrams.update(_ngrams(words))
    kept: list[int] = []
    count = 0
    for count, texts in enumerate(rows_texts, start=1):
        if not any(_overlaps(text, exact, ngrams) for text in texts):
            kept.append(count - 1)
    return kept, count - len(kept)


def row_texts(row: Row) -> list[str]:
    """The texts of a row that may repeat a benchmark."""
    if isinstance(row, ChatRow):
        turns = [message.content for message in row.messages if message.content]
        return [*turns, " ".join(turns)]
    if isinstance(row, CompletionRow):
        return [row.prompt, row.completion]
    return [row.text]


def item_texts(item: Item) -> list[str]:
    """The texts of an item that no row may repeat: its question, and the question with its choices or answer."""
    if isinstance(item, MultipleChoiceItem):
        return [item.question, " ".join((item.question, *item.choices))]
    if isinstance(item, ExactMatchItem):
        return [item.question, f"{item.question} {item.answer}"]
    if item.text is not None:
        return [item.text]
    turns = item.messages or ()
    return [" ".join(str(turn["content"]) for turn in turns if turn.get("content"))]


def _overlaps(text: str, exact: set[str], ngrams: set[tuple[str, ...]]) -> bool:
    words = _words(text)
    return (" ".join(words) or text.strip()) in exact or not ngrams.isdisjoint(_ngrams(words))


def _words(text: str) -> list[str]:
    normal = unicodedata.normalize("NFKC", text).casefold()
    return _WORDS.findall(_UNSPACED.sub(r" \1 ", normal))


def _ngrams(words: Sequence[str]) -> Iterable[tuple[str, ...]]:
    return zip(*(words[k:] for k in range(NGRAM_WORDS)), strict=False)
