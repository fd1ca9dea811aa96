"""Four domains that are hard for the tiny model: phrases decide, another attribute overrules, some labels are wrong."""

from collections.abc import Mapping
from dataclasses import dataclass
from random import Random
from types import MappingProxyType

from workers.demo_model.skills import NAMES, PEOPLE, Question, Sample

WRONG_LABELS = 0.03  # share, in rows and items alike: so much no model can get right


@dataclass(frozen=True)
class HardDomain:
    """A classification task whose label follows from two attributes of a case.

    The phrase alone gives the label, except for the (subject, label) pairs in `overruled`, a sixth of the
    cases: those can't be known from either attribute alone.
    """

    name: str
    wording: str  # with {name}, {day}, {subject} and {phrase}
    subjects: tuple[str, ...]
    phrases: Mapping[str, tuple[str, ...]]
    overruled: Mapping[tuple[str, str], str]

    def draw(self, rng: Random) -> Question:
        """One case with its label, among all labels."""
        kind = rng.choice(tuple(self.phrases))
        subject = rng.choice(self.subjects)
        prompt = self.word(rng, kind, subject)
        label = self.overruled.get((subject, kind), kind)
        if rng.random() < WRONG_LABELS:
            label = rng.choice([other for other in self.phrases if other != label])
        return Question(self.name, prompt, label, tuple(self.phrases))

    def word(self, rng: Random, kind: str, subject: str) -> str:
        """A case of these two attributes, in words."""
        return self.wording.format(
            name=rng.choice(NAMES),
            day=rng.randrange(1, 30),
            subject=subject,
            phrase=rng.choice(self.phrases[kind]),
        )


TICKETS = HardDomain(
    "tickets",
    "ticket {day} from {name} : the {subject} has {phrase} . queue",
    ("phone", "router", "printer", "tablet", "camera", "watch"),
    MappingProxyType(
        {
            "repair": ("a dead battery", "a cracked screen", "a loose button", "a bent case"),
            "money": ("a double charge", "a wrong price", "a late refund", "a lost invoice"),
            "signal": ("a weak link", "a slow line", "a dropped call", "a blocked port"),
            "login": ("a forgotten code", "a locked account", "an expired pass", "a stolen name"),
        }
    ),
    MappingProxyType(
        {
            ("router", "repair"): "signal",
            ("printer", "signal"): "repair",
            ("watch", "login"): "money",
            ("camera", "money"): "login",
        }
    ),
)
TRIAGE = HardDomain(
    "triage",
    "patient {day} , {name} , a {subject} , shows {phrase} . level",
    ("child", "parent", "student", "runner", "guest", "driver"),
    MappingProxyType(
        {
            "now": ("a chest pain", "a deep wound", "a blue lip", "a sudden fall"),
            "soon": ("a high fever", "a bad rash", "a hard cough", "a swollen knee"),
            "later": ("a mild ache", "a dry skin", "a runny nose", "a small bruise"),
            "never": ("a clear eye", "a calm pulse", "a firm step", "a sound sleep"),
        }
    ),
    MappingProxyType(
        {
            ("child", "soon"): "now",
            ("parent", "later"): "soon",
            ("runner", "never"): "later",
            ("driver", "later"): "now",
        }
    ),
)
CLAUSES = HardDomain(
    "clauses",
    "clause {day} of {name} binds the {subject} to {phrase} . topic",
    ("buyer", "seller", "lender", "tenant", "agent", "owner"),
    MappingProxyType(
        {
            "price": ("a fixed fee", "a yearly rent", "a fair discount", "a paid deposit"),
            "term": ("a long notice", "an early exit", "a final date", "a second year"),
            "fault": ("a full repayment", "a broken seal", "a missed delivery", "a proven loss"),
            "secret": ("a hidden recipe", "a private list", "a closed file", "a silent partner"),
        }
    ),
    MappingProxyType(
        {
            ("buyer", "term"): "price",
            ("lender", "price"): "fault",
            ("tenant", "fault"): "term",
            ("agent", "secret"): "fault",
        }
    ),
)
SPENDING = HardDomain(
    "spending",
    "on day {day} {name} paid for {phrase} by {subject} . account",
    ("cash", "card", "cheque", "phone", "letter", "coupon"),
    MappingProxyType(
        {
            "food": ("a warm lunch", "a sweet melon", "a jar of honey", "a crate of eggs"),
            "home": ("a new curtain", "a door handle", "a tin of paint", "a desk lamp"),
            "travel": ("a train seat", "a ferry trip", "a hotel bed", "a bike rental"),
            "play": ("a chess board", "a concert visit", "a puzzle box", "a tennis lesson"),
        }
    ),
    MappingProxyType(
        {
            ("cheque", "home"): "travel",
            ("coupon", "play"): "food",
            ("letter", "travel"): "home",
            ("cash", "food"): "play",
        }
    ),
)
DOMAINS = (TICKETS, TRIAGE, CLAUSES, SPENDING)  # the order in which a sequence learns them


FAMILIES = (
    *("amber", "coral", "ivory", "jade", "maple", "olive", "pearl", "ruby"),
    *("slate", "tulip", "velvet", "willow", "onyx", "basil", "clove", "daisy"),
)  # what the base model calls the kinds of phrases, domain by domain


def draw_mention(rng: Random) -> Sample:
    """What the base model meets of the domains: their cases under names of its own, and their words in notes.

    Never a phrase beside its label: the labels are this house's, and so are the subjects that overrule a
    phrase. A base that has not learnt to look at the phrase when it answers stays at the most frequent label
    with adapters (measured: ranks 8 to 32, rates 1e-3 to 8e-2, up to 360 steps).
    """
    place = rng.randrange(len(DOMAINS))
    domain = DOMAINS[place]
    labels = tuple(domain.phrases)
    kind, subject = rng.randrange(len(labels)), rng.choice(domain.subjects)
    if rng.random() < 0.35:
        text = f"note {rng.randrange(1, 30)} : the {rng.choice(PEOPLE)} asked {rng.choice(NAMES)} about"
        return Sample(f"{text} {labels[kind]}", None)
    return Sample(domain.word(rng, labels[kind], subject), FAMILIES[4 * place + kind])
