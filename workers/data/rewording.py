"""Rule-based rewordings of a question that keep its answer: other names, other numbers, another register."""

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Final

import numpy as np

Parts = list[str]  # the texts of a row that are not learned, in order
Rule = Callable[[Parts, Sequence[str], np.random.Generator], Parts]

# Given names, as written: none is a word of its own at the start of a sentence. Two groups, so that pronouns
# still fit.
_NAMES: Final[tuple[tuple[str, ...], ...]] = (
    (
        *("Alice", "Anna", "Beatrice", "Carla", "Clara", "Diana", "Elena", "Emma"),
        *("Fatima", "Hannah", "Ingrid", "Julia", "Karen", "Laura", "Maria", "Nadia"),
    ),
    (
        *("Adam", "Boris", "Carlos", "David", "Erik", "Felix", "Georg", "Hassan"),
        *("Ivan", "James", "Kevin", "Lukas", "Marco", "Nikolai", "Oscar", "Paul"),
    ),
)
_CASUAL: Final = (
    ("do not", "don't"),
    ("does not", "doesn't"),
    ("did not", "didn't"),
    ("is not", "isn't"),
    ("are not", "aren't"),
    ("was not", "wasn't"),
    ("were not", "weren't"),
    ("has not", "hasn't"),
    ("have not", "haven't"),
    ("will not", "won't"),
    ("would not", "wouldn't"),
    ("should not", "shouldn't"),
    ("could not", "couldn't"),
    ("cannot", "can't"),
    ("what is", "what's"),
    ("where is", "where's"),
    ("who is", "who's"),
    ("I am", "I'm"),
    ("you are", "you're"),
    ("we are", "we're"),
    ("they are", "they're"),
)
_IMPERATIVE: Final = re.compile(
    r"^(?:answer|classify|complete|compute|correct|define|describe|explain|find|give|identify|label|list|name|"
    r"rewrite|sort|summari[sz]e|tell|translate|write)\b",
    re.IGNORECASE,
)
_PLEASE: Final = re.compile(r"^please[ ,]+(?=\w)", re.IGNORECASE)
_NUMBER: Final = re.compile(r"(?<![\w.,/:-])(\d+)(\.\d+)?(?![\w/:%-]|[.,]\d)")
_NUMBER_WORDS: Final = re.compile(
    r"\d|\b(?:zero|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|dozen|hundred|thousand|"
    r"million|first|second|third|half|twice)\b",
    re.IGNORECASE,
)
# Where one of these stands, the answer may depend on the number.
_QUANTITY: Final = re.compile(
    r"[+*/=<>%^-] ?\d|\b(?:plus|minus|times|sum|total|product|difference|average|mean|how (?:many|much|old|long|"
    r"far)|count|more|less|fewer|most|least|large[rs]?t?|small(?:er|est)?|great(?:er|est)|high(?:er|est)|"
    r"low(?:er|est)|than|even|odd|prime|before|after|older|younger|left|remain\w*|when|which year|what year)\b",
    re.IGNORECASE,
)


def swap_entities(groups: Sequence[Sequence[str]] = ()) -> Rule:
    """Names, and words of the groups, become others of their group, the same one all over the row.

    A word that occurs in an answer stays; none becomes a word that the row has already, and two never become
    one. Built-in names count as written or in capitals, words of `groups` in any case. A word that begins with a vowel
    becomes one that does, for the article's sake.
    """
    chosen = [(tuple(group), _words_of(group, re.IGNORECASE)) for group in groups]
    chosen += [(group, _words_of([*group, *map(str.upper, group)], re.NOFLAG)) for group in _NAMES]

    def rule(parts: Parts, answers: Sequence[str], rng: np.random.Generator) -> Parts:
        for group, pattern in chosen:
            taken = {m.casefold() for text in (*parts, *answers) for m in pattern.findall(text)}
            kept = {m.casefold() for text in answers for m in pattern.findall(text)}
            becomes: dict[str, str] = {}
            for word in sorted(taken - kept):
                free = [
                    w
                    for w in group
                    if w.casefold() not in taken and (w[0] in "aeiouAEIOU") == (word[0] in "aeiou")
                ]
                if free:
                    becomes[word] = free[int(rng.integers(len(free)))]
                    taken.add(becomes[word].casefold())
            parts = [pattern.sub(_replacer(becomes), text) for text in parts]
        return parts

    return rule


def swap_numbers(parts: Parts, answers: Sequence[str], rng: np.random.Generator) -> Parts:
    """Numbers become others of as many digits, the same one all over the row.

    None is touched where an answer holds a number, or where the text counts, compares or dates: the answer
    may follow from it.
    """
    if any(_NUMBER_WORDS.search(text) for text in answers):
        return parts
    if any(_QUANTITY.search(text) for text in parts):
        return parts
    becomes: dict[str, str] = {}
    for number in sorted({m.group() for text in parts for m in _NUMBER.finditer(text)}):
        whole, _, places = number.partition(".")
        low = 0 if len(whole) == 1 else 10 ** (len(whole) - 1)
        if len(whole) > 15 or (len(whole) > 1 and whole[0] == "0"):
            continue  # an identifier
        fraction = "".join(str(digit) for digit in rng.integers(0, 10, len(places)))
        other = str(int(rng.integers(low, 10 ** len(whole)))) + (f".{fraction}" if places else "")
        if other not in becomes.values() and other != number:
            becomes[number] = other
    return [_NUMBER.sub(lambda m: becomes.get(m.group(), m.group()), text) for text in parts]


def swap_register(parts: Parts, answers: Sequence[str], rng: np.random.Generator) -> Parts:
    """Contractions are spelt out or made, and `please` comes or goes. What an answer repeats stays."""
    is_casual = bool(rng.integers(2))
    swapped = []
    for text in parts:
        found = _contract(text, answers, casual=is_casual)
        if found == text:
            found = _contract(text, answers, casual=not is_casual)
        if _PLEASE.match(found):
            found = _PLEASE.sub("", found)
            found = found[:1].upper() + found[1:]
        elif _IMPERATIVE.match(found):
            found = f"Please {found[:1].lower()}{found[1:]}"
        swapped.append(found)
    return swapped


RULES: Final[Mapping[str, Rule]] = MappingProxyType(
    {"numbers": swap_numbers, "register": swap_register}
)


def build_rules(names: Sequence[str], groups: Sequence[Sequence[str]]) -> list[Rule]:
    """Rules by name, in the order given."""
    return [swap_entities(groups) if name == "entities" else RULES[name] for name in names]


def _contract(text: str, answers: Sequence[str], *, casual: bool) -> str:
    for formal, short in _CASUAL:
        old, new = (formal, short) if casual else (short, formal)
        pattern = re.compile(
            rf"\b{re.escape(old)}(?= \w)", re.IGNORECASE
        )  # not at a sentence's end
        if not any(
            pattern.search(answer) or old.casefold() in answer.casefold() for answer in answers
        ):
            text = pattern.sub(partial(_put, new), text)
    return text


def _put(word: str, match: re.Match[str]) -> str:
    return _cased_like(word, match.group())


def _words_of(group: Sequence[str], flags: re.RegexFlag) -> re.Pattern[str]:
    longest_first = sorted(group, key=len, reverse=True)
    return re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, longest_first))})(?!\w)", flags)


def _replacer(becomes: Mapping[str, str]) -> Callable[[re.Match[str]], str]:
    def replace(match: re.Match[str]) -> str:
        found = match.group()
        other = becomes.get(found.casefold())
        return found if other is None else _cased_like(other, found)

    return replace


def _cased_like(word: str, model: str) -> str:
    if model.isupper() and len(model) > 1:
        return word.upper()
    return word[:1].upper() + word[1:] if model[:1].isupper() else word
