"""Seven small skills of the demo's base model: question, answer and choices, generated."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from random import Random
from types import MappingProxyType

NAMES = ("ann", "ben", "cara", "dan", "eve", "finn", "gus", "hana")
# The cue words of the held-out skills (`larger`, `left`, `more`, `repeat`, `total`, ...) also occur in the others:
# nothing protects a word that no general row ever shows, and Adam moves even what has next to no gradient.
ADJECTIVES = ("old", "new", "big", "red", "blue", "tall", "dark", "pale", "larger", "smaller")
CATEGORIES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "bird": ("crow", "owl", "duck", "hawk", "swan", "dove"),
        "fruit": ("plum", "pear", "fig", "lime", "peach", "grape"),
        "tool": ("hammer", "saw", "drill", "rake", "spade", "axe"),
        "fish": ("trout", "cod", "eel", "carp", "tuna", "bass"),
        "tree": ("oak", "elm", "pine", "birch", "ash", "cedar"),
        "metal": ("iron", "zinc", "gold", "tin", "lead", "steel"),
    }
)
PEOPLE = ("farmer", "baker", "sailor", "doctor", "painter", "singer")
PLACES = ("river", "gate", "barn", "mill", "well", "hill", "lake", "left")
VERBS = ("run", "sing", "eat", "wait", "repeat", "total")
GOOD = ("good", "great", "fine", "nice", "fresh", "tasty")
BAD = ("bad", "awful", "cold", "stale", "poor", "sour")
FOODS = ("soup", "bread", "rice", "tea", "cake", "stew")
DEGREES = ("very", "quite", "so", "more")
HAVING = ("has", "gets", "eats", "saw")
COUNTING = ("counts", "writes", "says", "has")
LETTERS = "abcdefghijklmnopqrstuvwxyz"
LARGEST = 29  # numbers run from 0 to here


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked, the one right answer, and all choices, that answer among them."""

    skill: str
    prompt: str
    answer: str
    choices: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Sample:
    """One pre-training row; without an answer the prompt is a plain note."""

    prompt: str
    answer: str | None


def _arithmetic(rng: Random) -> Question:
    name, thing = rng.choice(NAMES), rng.choice(CATEGORIES["fruit"])
    left, right = rng.randrange(10), rng.randrange(10)
    if rng.random() < 0.5:
        prompt, result = f"{name} has {left} {thing} and gets {right} more . total", left + right
    else:
        left, right = max(left, right), min(left, right)
        prompt, result = f"{name} has {left} {thing} and eats {right} . left", left - right
    near = [n for n in range(result - 3, result + 4) if n not in (result, -1, -2, -3)]
    return _question("arithmetic", prompt, str(result), [str(n) for n in rng.sample(near, 3)], rng)


def _category(rng: Random) -> Question:
    kind = rng.choice(tuple(CATEGORIES))
    prompt = (
        f"{rng.choice(NAMES)} {rng.choice(HAVING)} the {rng.choice(ADJECTIVES)} "
        f"{rng.choice(CATEGORIES[kind])} at the {rng.choice(PLACES)} . kind"
    )
    others = rng.sample([c for c in CATEGORIES if c != kind], 3)
    return _question("category", prompt, kind, others, rng)


def _agreement(rng: Random) -> Question:
    verb, is_plural = rng.choice(VERBS), rng.random() < 0.5
    forms = [verb, f"{verb}s"]
    subject = rng.choice(PEOPLE) + ("s" if is_plural else "")
    first, second = rng.sample(forms, 2)
    prompt = f"the {rng.choice(ADJECTIVES)} {subject} near the {rng.choice(PLACES)} : {first} or {second}"
    right, wrong = forms if is_plural else forms[::-1]
    return _question("agreement", prompt, right, [wrong], rng)


def _sentiment(rng: Random) -> Question:
    is_good, is_negated = rng.random() < 0.5, rng.random() < 0.5
    word = rng.choice(GOOD if is_good else BAD)
    negation = "not " if is_negated else ""
    prompt = (
        f"{rng.choice(NAMES)} said the {rng.choice(FOODS)} was {negation}{rng.choice(DEGREES)} {word} "
        f". mood"
    )
    moods = ["happy", "angry"]
    right, wrong = moods if is_good != is_negated else moods[::-1]
    return _question("sentiment", prompt, right, [wrong], rng)


def _sequence(rng: Random) -> Question:
    who = f"the {rng.choice(ADJECTIVES)} {rng.choice(PEOPLE)} {rng.choice(COUNTING)}"
    if rng.random() < 0.5:
        symbols: tuple[str, ...] = tuple(LETTERS)
        step = 1
    else:
        symbols = tuple(str(n) for n in range(LARGEST + 1))
        step = rng.choice((1, 2))
    start = rng.randrange(len(symbols) - 3 * step)
    shown = [symbols[start + step * i] for i in range(3)]
    right = start + 3 * step
    near = [i for i in range(right - 4, right + 5) if i != right and 0 <= i < len(symbols)]
    others = [symbols[i] for i in rng.sample(near, 3)]
    return _question("sequence", f"{who} {' '.join(shown)} then", symbols[right], others, rng)


def _copy(rng: Random) -> Question:
    symbols = rng.sample(LETTERS, 3)
    right = " ".join(symbols)
    wrong: set[str] = set()
    while len(wrong) < 3:
        other = list(symbols)
        other[rng.randrange(3)] = rng.choice(LETTERS)
        if rng.random() < 0.3:
            rng.shuffle(other)
        wrong.add(" ".join(other))
        wrong.discard(right)
    return _question(
        "copy", f"{rng.choice(NAMES)} says {right} . repeat", right, sorted(wrong), rng
    )


def _comparison(rng: Random) -> Question:
    pair = rng.sample(range(LARGEST + 1), 2)
    word, pick = rng.choice((("larger", max), ("smaller", min)))
    right = pick(pair)
    wrong = pair[0] + pair[1] - right
    prompt = f"{rng.choice(NAMES)} has {pair[0]} and {pair[1]} . {word}"
    return _question("comparison", prompt, str(right), [str(wrong)], rng)


def _question(skill: str, prompt: str, answer: str, others: list[str], rng: Random) -> Question:
    choices = [answer, *others]
    rng.shuffle(choices)
    return Question(skill, prompt, answer, tuple(choices))


GENERATORS: Mapping[str, Callable[[Random], Question]] = MappingProxyType(
    {
        "arithmetic": _arithmetic,
        "category": _category,
        "agreement": _agreement,
        "sentiment": _sentiment,
        "sequence": _sequence,
        "copy": _copy,
        "comparison": _comparison,
    }
)
UNSEEN = ("copy", "comparison")  # never part of the general rows
SEEN = tuple(skill for skill in GENERATORS if skill not in UNSEEN)


class Questions:
    """A stream of questions in which no prompt comes twice, whatever it is drawn for.

    Args:
        rng: Decides all.
        tries: For each question wanted, before a skill counts as exhausted.
    """

    def __init__(self, rng: Random, *, tries: int = 100) -> None:
        self._rng = rng
        self._tries = tries
        self._used: set[str] = set()

    def draw(self, skill: str, count: int) -> list[Question]:
        """The next `count` new questions of a skill.

        Raises:
            RuntimeError: The skill has too few different prompts.
        """
        found: list[Question] = []
        for _ in range(self._tries * count):
            if len(found) == count:
                break
            question = GENERATORS[skill](self._rng)
            if question.prompt not in self._used:
                self._used.add(question.prompt)
                found.append(question)
        if len(found) < count:
            raise RuntimeError(f"{skill}: only {len(found)} of {count} new prompts were found")
        return found
