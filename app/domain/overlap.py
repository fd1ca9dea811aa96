"""Which rows share text with a benchmark: such rows would teach the test."""

import itertools
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from app.domain.benchmarks import ExactMatchItem, MultipleChoiceItem
from app.domain.conversations import ChatRow, PreferenceRow
from app.domain.rows import CompletionRow, Item, Row

NGRAM_WORDS: Final = 13  # the length that GPT-3's and later decontaminations use
_WORDS = re.compile(r"[^\W_]+")
# Scripts written without spaces would be one word a sentence: each of their characters counts as a word.
_UNSPACED = re.compile(r"([\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\u0e00-\u0e7f])")


class KnownTexts:
    """The texts of a benchmark that no row may repeat.

    A text overlaps when it equals one of them after normalisation, or shares 13 consecutive words with one.
    Texts without any letter or digit are compared as they are. Of every 13 words their 64-bit hash is kept: a
    hundredth of the memory that words take, and ten million comparisons meet by chance once in a million runs.
    """

    def __init__(self, texts: Iterable[str] = ()) -> None:
        self._exact: set[str] = set()
        self._ngrams: set[int] = set()
        for text in texts:
            self.add(text)

    def add(self, text: str) -> None:
        """Knows one text more."""
        whole, ngrams = _take_apart(text)
        self._exact.add(whole)
        self._ngrams.update(ngrams)

    def holds(self, whole: str, ngrams: Iterable[int]) -> bool:
        """Whether a text that `_take_apart` took apart overlaps."""
        return whole in self._exact or not self._ngrams.isdisjoint(ngrams)


def drop_overlapping(
    rows_texts: Iterable[Sequence[str]], benchmark_texts: Iterable[str]
) -> tuple[list[int], int]:
    """Rows that share no text with a benchmark.

    Args:
        rows_texts: The texts of each row: turns, prompt and completion, or the text.
        benchmark_texts: Questions, with their choices where there are some.

    Returns:
        Positions of the rows to keep, and how many were dropped.
    """
    known = KnownTexts(benchmark_texts)
    kept: list[int] = []
    count = 0
    for count, texts in enumerate(rows_texts, start=1):
        if not any(known.holds(*_take_apart(text)) for text in texts):
            kept.append(count - 1)
    return kept, count - len(kept)


def find_overlaps(
    rows: Iterable[tuple[int, Row]], benchmarks: Mapping[str, KnownTexts]
) -> dict[str, list[int]]:
    """Line numbers of the rows that overlap, by benchmark; benchmarks that none overlaps are left out.

    A row is read as its texts and as all of them in a row, so what runs from one turn into the next counts.
    """
    found: dict[str, list[int]] = {name: [] for name in benchmarks}
    for line, row in rows:
        is_chat = isinstance(row, ChatRow | PreferenceRow)
        texts = row_texts(row)[:-1] if is_chat else row_texts(row)
        words = [_split(text) for text in texts]
        wholes = [" ".join(each) or text.strip() for each, text in zip(words, texts, strict=True)]
        wholes.append(" ".join(itertools.chain.from_iterable(words)) or wholes[-1])
        ngrams = _hash_ngrams(list(itertools.chain.from_iterable(words)))
        for name, known in benchmarks.items():
            if any(known.holds(whole, ()) for whole in wholes) or known.holds(wholes[0], ngrams):
                found[name].append(line)
    return {name: lines for name, lines in found.items() if lines}


def normalise(text: str) -> str:
    """A text as it is compared as a whole: its words, or itself where it has none."""
    return " ".join(_split(text)) or text.strip()


def row_texts(row: Row) -> list[str]:
    """The texts of a row that may repeat a benchmark."""
    if isinstance(row, ChatRow):
        turns = [message.content for message in row.messages if message.content]
        return [*turns, " ".join(turns)]
    if isinstance(row, PreferenceRow):
        other = [turn.content for turn in row.non_preferred_output if turn.content]
        return [*other, *row_texts(row.preferred)]
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


def _take_apart(text: str) -> tuple[str, list[int]]:
    """A text as it is compared as a whole, and the hash of every 13 words in a row."""
    words = _split(text)
    return " ".join(words) or text.strip(), _hash_ngrams(words)


def _split(text: str) -> list[str]:
    normal = text if text.isascii() else unicodedata.normalize("NFKC", text)
    normal = normal.casefold()
    return _WORDS.findall(normal if text.isascii() else _UNSPACED.sub(r" \1 ", normal))


def _hash_ngrams(words: Sequence[str]) -> list[int]:
    return [hash(gram) for gram in zip(*(words[k:] for k in range(NGRAM_WORDS)), strict=False)]
