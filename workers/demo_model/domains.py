"""The demo's two domains, labelled by made-up house rules, and notes that only mention their words."""

from collections.abc import Mapping
from dataclasses import dataclass
from random import Random
from types import MappingProxyType
from typing import Protocol

from workers.demo_model.skills import NAMES, PEOPLE, Question

THINGS = ("phone", "router", "printer", "tablet", "camera", "watch")


@dataclass(frozen=True, slots=True)
class Domain:
    """A classification task: each label with the phrases that decide it, and how a case is worded."""

    name: str
    wording: str  # with {name}, {thing} and {phrase}
    phrases: Mapping[str, tuple[str, ...]]

    def draw(self, rng: Random) -> Question:
        """One case with its label, among all labels."""
        label = rng.choice(tuple(self.phrases))
        prompt = self.wording.format(
            name=rng.choice(NAMES),
            thing=rng.choice(THINGS),
            phrase=rng.choice(self.phrases[label]),
            day=rng.randrange(1, 30),
        )
        return Question(self.name, prompt, label, tuple(self.phrases))


class Task(Protocol):
    """A classification task whose cases are drawn."""

    @property
    def name(self) -> str:
        """What its questions are said to test."""

    def draw(self, rng: Random) -> Question:
        """One case with its label, among all labels."""


def draw_new(task: Task, count: int, rng: Random, used: set[str]) -> list[Question]:
    """`count` cases of a task whose prompts are not in `used`, which they join.

    Raises:
        RuntimeError: The task has too few different prompts.
    """
    found: list[Question] = []
    for _ in range(200 * count):
        if len(found) == count:
            return found
        question = task.draw(rng)
        if question.prompt not in used:
            used.add(question.prompt)
            found.append(question)
    raise RuntimeError(f"{task.name}: only {len(found)} of {count} new prompts were found")


TICKETS = Domain(
    "tickets",
    "ticket {day} from {name} : the {thing} has {phrase} . queue",
    MappingProxyType(
        {
            "repair": (
                *("a dead battery", "a cracked screen", "a loose button", "a broken lens"),
                *("a bent case", "a stuck key"),
            ),
            "money": (
                *("a double charge", "a wrong price", "a late refund", "a lost invoice"),
                *("a missing discount", "an unpaid bill"),
            ),
            "signal": (
                *("a weak link", "a slow line", "a dropped call", "a blocked port"),
                *("a noisy channel", "a silent radio"),
            ),
            "login": (
                *("a forgotten code", "a locked account", "an expired pass", "an unknown user"),
                *("a stolen name", "a closed profile"),
            ),
        }
    ),
)
TRIAGE = Domain(
    "triage",
    "patient {day} , {name} , the {thing} shows {phrase} . level",
    MappingProxyType(
        {
            "now": ("a chest pain", "a deep wound", "a blue lip", "a sudden fall"),
            "soon": ("a high fever", "a bad rash", "a hard cough", "a swollen knee"),
            "later": ("a mild ache", "a dry skin", "a runny nose", "a small bruise"),
        }
    ),
)
DOMAINS = (TICKETS, TRIAGE)


def draw_note(rng: Random) -> str:
    """A sentence with two phrases of one kind, or with a label's word; never a phrase beside its label.

    A base that has never met the words of a domain, or can't tell kinds of phrases apart, can't learn it
    with small adapters.
    """
    domain = rng.choice(DOMAINS)
    writer, label = rng.choice(PEOPLE), rng.choice(tuple(domain.phrases))
    if rng.random() < 0.3:
        return f"note {rng.randrange(1, 30)} : the {writer} asked {rng.choice(NAMES)} about {label}"
    first, second = rng.sample(domain.phrases[label], 2)
    return f"note : the {writer} wrote of the {rng.choice(THINGS)} , {first} and {second}"
