"""SENSOR.md: what was promised, what was measured, with exact intervals."""

import platform
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import scipy
from scipy import special

from app.domain.controller import decide
from app.domain.sensing import read_sensor
from tests.benchmarks.sensor.running import NEAR, SPOT_CHECKS, Outcome, Scenario
from tests.benchmarks.sensor.scenarios import LOOKS, MEAN, SUITES, Size, items, recommend

Measured = Sequence[tuple[Scenario, Outcome]]

NOTES = {
    "a-pass": "the items of the pass alone",
    "a-few": "50 items a benchmark",
    "a-sticky": "200 items, answers stick 0.9",
    "a-restless": "200 items, 30 % discordant",
    "b-few": "50 items a benchmark",
    "b-sticky": "answers stick 0.9",
    "b-restless": "30 % discordant",
    "c-fixed": "the same answers at every look",
    "c-fresh": "answers drawn anew at every look",
    "c-own": "one benchmark alone falls, its own limit's items",
    "c-text": "the text alone rises, its own items",
    "c-pass": "the items of the pass alone: nothing is promised",
}
NOT_PROMISED = frozenset({"c-pass"})


@dataclass(frozen=True, slots=True)
class Share:
    """So many of so many, with its exact 95 % interval."""

    count: int
    of: int

    @property
    def value(self) -> float:
        """The share itself."""
        return self.count / self.of

    @property
    def interval(self) -> tuple[float, float]:
        """Clopper and Pearson's, two-sided."""
        return clopper_pearson(self.count, self.of)

    def __str__(self) -> str:
        """As a table shows it."""
        low, high = self.interval
        return f"{self.value:.1%} [{low:.1%}, {high:.1%}]"


def clopper_pearson(count: int, of: int, level: float = 0.95) -> tuple[float, float]:
    """Exact two-sided confidence interval of a share."""
    tail = (1 - level) / 2
    low = 0.0 if count == 0 else float(special.betaincinv(count, of - count + 1, tail))
    high = 1.0 if count == of else float(special.betaincinv(count + 1, of - count, 1 - tail))
    return low, high


@dataclass(frozen=True, slots=True)
class Promise:
    """A share that must be at most, or at least, so large."""

    what: str
    share: Share
    bound: float
    is_most: bool

    @property
    def state(self) -> str:
        """`shown` by the whole interval, `kept` by the share alone, else `broken`."""
        low, high = self.share.interval
        if high <= self.bound if self.is_most else low >= self.bound:
            return "shown"
        is_kept = self.share.value <= self.bound if self.is_most else self.share.value >= self.bound
        return "kept" if is_kept else "broken"


def find_promises(measured: Measured, size: Size) -> list[Promise]:
    """The four promises, at every number of looks and for every suite."""
    found = []
    for scenario, outcome in measured:
        name, n_jobs = title(scenario), scenario.n_jobs
        is_promised = scenario.key not in NOT_PROMISED
        for looks in size.looks if scenario.key[0] in "abc" and is_promised else ():
            acted = Share(outcome.acted_by(looks), n_jobs)
            match scenario.key[0]:
                case "a":
                    found.append(Promise(f"A/A, {name}, {looks} looks", acted, 0.01, True))
                case "b":
                    found.append(Promise(f"at the limit, {name}, {looks} looks", acted, 0.05, True))
                case _:
                    found.append(Promise(f"above, {name}, {looks} looks", acted, 0.9, False))
        if scenario.key == f"late-{recommend(MEAN).look}":
            seen = Share(outcome.seen_within(1), n_jobs)
            found.append(Promise(f"above, {name}, the look at which it begins", seen, 0.9, False))
        if scenario.key in {f"a{i}" for i in range(len(SUITES))}:
            found += [
                Promise(f"pass, {name}, look {look}", Share(passed, n_jobs), 0.8, False)
                for look, passed in outcome.passed.items()
            ]
    return found


def title(scenario: Scenario) -> str:
    """Suite, and what is special."""
    note = NOTES.get(scenario.key)
    return scenario.suite.name if note is None else f"{scenario.suite.name}; {note}"


def write_report(measured: Measured, size: Size, command: str) -> str:
    """The whole document."""
    promises = find_promises(measured, size)
    states = Counter(promise.state for promise in promises)
    parts = [
        "# What the sensor promises, and what it does",
        "",
        f"Command: `{command}`. Python {platform.python_version()}, NumPy {np.__version__}, SciPy"
        f" {scipy.__version__}; one thread of a CPU, every draw seeded. Shares are of"
        f" {size.n_jobs:,} simulated jobs unless said, with Clopper and Pearson's 95 % intervals.",
        "",
        "| promise | bound | worst measured | at | state |",
        "|---|---|---|---|---|",
        *_worst(promises),
        "",
        f"Of {len(promises)} promised figures (every suite, every number of looks) {states['shown']} are"
        f" shown by their whole interval, {states['kept']} kept by the share alone, {states['broken']}"
        " broken.",
        *(f"- Broken: {p.what}: {p.share}." for p in promises if p.state == "broken"),
        "",
        *_method(measured, size),
        *_sections(dict_of(measured), size),
    ]
    return "\n".join(parts) + "\n"


def dict_of(measured: Measured) -> dict[str, tuple[Scenario, Outcome]]:
    """By key."""
    return {scenario.key: (scenario, outcome) for scenario, outcome in measured}


def _worst(promises: Sequence[Promise]) -> Iterable[str]:
    heads = {
        "A/A": "undamaged jobs are acted on in at most",
        "at the limit": "a true drop equal to the limit is acted on in at most",
        "above": "the limit + 2 points, with the declared items, is called `regress` in at least",
        "pass": "undamaged jobs pass, with the recommended items, in at least",
    }
    for start, head in heads.items():
        those = [p for p in promises if p.what.startswith(start + ",")]
        if not those:
            continue
        worst = (max if those[0].is_most else min)(those, key=lambda p: p.share.value)
        at = worst.what.removeprefix(start + ", ")
        yield f"| {head} | {worst.bound:.0%} | {worst.share} | {at} | {worst.state} |"


def _method(measured: Measured, size: Size) -> list[str]:
    read = sum(outcome.n_read for _, outcome in measured)
    spots = sum(outcome.n_spots for _, outcome in measured)
    actions: Counter[str] = Counter()
    for _, outcome in measured:
        actions.update(outcome.actions)
    told = ", ".join(f"{name} {count:,}" for name, count in sorted(actions.items()))
    return [
        "## How",
        "",
        f"A job is looked at again and again by `{read_sensor.__module__}.read_sensor`, from item scores, and"
        f" `{decide.__module__}.decide` answers each reading; *acted* is the job's first `regress` that the"
        " controller answered with a change (any other answer, or a change without that verdict, ends the run"
        f" with an error). First actions: {told}.",
        "",
        f"The sensor read {read:,} looks: of every job the first (of the suites' own rows, where nothing is wrong or"
        f" a limit is just reached, each of the first {size.read_all_until}), each look at which passes are counted, each whose p-value by counts"
        f" came within {NEAR:.0f} times the look's alpha, and at random {SPOT_CHECKS:.2%} of the rest ({spots:,}"
        " looks; one called `regress` among these would have ended the run).",
        "",
        "Which items the baseline gets right is drawn per job; 10 % of the items are discordant unless said"
        " (what power is computed for), documents change by 0.1 nats per token. Answers are drawn anew at every"
        " look (the worst case for false calls), or *stick*: correlation 0.9 between looks. Drops are relative"
        " and hit every benchmark above chance; an NLL rises by nats per token. The benchmark at floor has four"
        " choices and an accuracy of a quarter, so in 5 % of jobs it is taken for above chance. A change of"
        " strength after an action is not simulated: what is counted is each job's first.",
        "",
    ]


def _sections(by_key: dict[str, tuple[Scenario, Outcome]], size: Size) -> list[str]:
    def those(start: str) -> list[tuple[Scenario, Outcome]]:
        return [pair for key, pair in by_key.items() if key.startswith(start)]

    called = [1, 5, *size.looks]
    lines = ["## Items that the API recommends", "", *_recommended(), ""]
    lines += ["## What `power` says of one look", "", *_predicted(those("p-")), ""]
    lines += ["## Undamaged jobs that were acted on", "", *_acted(those("a"), size.looks), ""]
    lines += ["## Undamaged jobs that pass at a look", "", *_passes(those("a")), ""]
    lines += ["## A true drop equal to the limit", "", *_acted(those("b"), size.looks), ""]
    lines += ["## The limit + 2 points, from the first look", "", *_acted(those("c"), called), ""]
    lines += ["## The limit + 2 points, from a look drawn at random", "", *_late(those("late"))]
    return lines


def _recommended() -> Iterable[str]:
    yield "| suite | an undamaged model passes with 80 % | the limit + 2 points is called with 90 % | recommended |"
    yield "|---|---|---|---|"
    for suite in SUITES:
        found = recommend(suite)
        yield (
            f"| {suite.name} | {found.items_for_pass:,} | {found.items_for_regress:,} |"
            f" {found.items:,} ({found.binds}) |"
        )
    yield ""
    told = ", ".join(f"{items(MEAN, look):,} at look {look:,}" for look in LOOKS)
    yield (
        "Gate items a benchmark; accuracies 0.35, 0.5, 0.6, 0.7 and 0.85. What is recommended is for damage that"
        f" begins at look {recommend(MEAN).look} or before: so many evaluations a job is given where nobody says"
        " otherwise. A call at a later look spends less of the error, so it needs more items"
        f" (`power(..., look=k)`): of five accuracies {told}. A limit of one benchmark's own is tested on that"
        " benchmark alone, so its row in the answer names more."
    )


def _predicted(pairs: Measured) -> Iterable[str]:
    yield "| jobs watched by | items | what | said | measured |"
    yield "|---|---|---|---|---|"
    for scenario, outcome in pairs:
        is_pass = scenario.key.startswith("p-pass")
        what = "an undamaged mean passes" if is_pass else "the limit + 2 points is called"
        count = outcome.passed[1] if is_pass else outcome.acted_by(1)
        yield (
            f"| {title(scenario)} | {scenario.n_items:,} | {what} | {80 if is_pass else 90}% |"
            f" {Share(count, scenario.n_jobs)} of {scenario.n_jobs:,} |"
        )


def _acted(pairs: Measured, looks: Sequence[int]) -> Iterable[str]:
    yield "| jobs watched by | items | " + " | ".join(_looks(n) for n in looks) + " |"
    yield "|---|---|" + "---|" * len(looks)
    for scenario, outcome in pairs:
        cells = (str(Share(outcome.acted_by(n), scenario.n_jobs)) for n in looks)
        yield f"| {title(scenario)} | {scenario.n_items:,} | " + " | ".join(cells) + " |"


def _passes(pairs: Measured) -> Iterable[str]:
    looks = pairs[0][0].passes_at
    yield "| jobs watched by | items | " + " | ".join(f"look {n:,}" for n in looks) + " |"
    yield "|---|---|" + "---|" * len(looks)
    for scenario, outcome in pairs:
        cells = (
            str(Share(outcome.passed[n], scenario.n_jobs)) if n in outcome.passed else ""
            for n in looks
        )
        yield f"| {title(scenario)} | {scenario.n_items:,} | " + " | ".join(cells) + " |"


def _late(pairs: Measured) -> Iterable[str]:
    yield "| looks of a job | items | declared for | acted on before | at its first look | within 5 | within 20 |"
    yield "|---|---|---|---|---|---|---|"
    for scenario, outcome in pairs:
        n_jobs = scenario.n_jobs
        declared = scenario.n_looks if scenario.key.endswith("-own") else recommend(MEAN).look
        cells = [
            Share(outcome.acted_before_damage(), n_jobs),
            *(Share(outcome.seen_within(n), n_jobs) for n in (1, 5, 20)),
        ]
        yield (
            f"| {scenario.n_looks:,} | {scenario.n_items:,} | look {declared:,} | "
            + " | ".join(str(cell) for cell in cells)
            + " |"
        )

    yield ""
    yield (
        "The recommended items promise nothing of damage that begins after the look they are declared for: long"
        " jobs need the items of their last look, as the second row of each pair has them."
    )


def _looks(n: int) -> str:
    return "1 look" if n == 1 else f"{n:,} looks"
