"""What is simulated for SENSOR.md: suites, true drops, budgets of items and numbers of looks."""

from dataclasses import dataclass, replace
from functools import lru_cache

from app.domain.power import DETECTION_MARGIN, FEWEST_ITEMS, Recommendation, power
from tests.benchmarks.sensor.running import POLICY, Scenario
from tests.benchmarks.sensor.simulation import Suite

LOOKS = (20, 200, 2000)
PREDICTED_JOBS = 4  # times as many where one look is compared with what `power` says of it
FIVE = (0.35, 0.5, 0.6, 0.7, 0.85)
MEAN = Suite("five accuracies", FIVE)
OWN = Suite("five accuracies, each with its own limit", FIVE, has_own_limits=True)
TEXT = Suite("four accuracies and a text", FIVE[:4], n_texts=1)
FLOOR = Suite("four accuracies and one at floor", FIVE[:4], n_at_chance=1)
SUITES = (MEAN, OWN, TEXT, FLOOR)
ABOVE = POLICY.max_drop + DETECTION_MARGIN
RISE_ABOVE = POLICY.max_nll_increase + DETECTION_MARGIN


@dataclass(frozen=True, slots=True)
class Size:
    """How much is simulated."""

    n_jobs: int
    looks: tuple[int, ...] = LOOKS
    read_all_until: int = 5

    @property
    def most(self) -> int:
        """Looks of a job."""
        return self.looks[-1]


@lru_cache
def recommend(suite: Suite, look: int = 1) -> Recommendation:
    """The items that the API recommends for this suite.

    Raises:
        ValueError: No number of items is enough.
    """
    found = power(POLICY, suite.planned(POLICY), look=look).recommended
    if found is None or found.items is None:
        raise ValueError(f"nothing is recommended for {suite.name}")
    return found


def items(suite: Suite, look: int = 1) -> int:
    """The number alone."""
    return recommend(suite, look).items or 0


def undamaged(size: Size) -> list[Scenario]:
    """A/A jobs: nothing is ever wrong."""
    common = Scenario(
        "",
        MEAN,
        items(MEAN),
        size.n_jobs,
        size.most,
        read_all_until=size.read_all_until,
        passes_at=(1, *size.looks),
    )
    few = replace(common, passes_at=(1,), read_all_until=1)
    return [
        *(
            replace(common, key=f"a{i}", suite=suite, n_items=items(suite), seed=10 + i)
            for i, suite in enumerate(SUITES)
        ),
        replace(
            common,
            key="a-pass",
            n_items=recommend(MEAN).items_for_pass or 0,
            read_all_until=1,
            seed=20,
        ),
        replace(few, key="a-few", n_items=FEWEST_ITEMS, seed=21),
        replace(few, key="a-sticky", n_items=200, stickiness=0.9, seed=22),
        replace(few, key="a-restless", n_items=200, suite=replace(MEAN, discordance=0.3), seed=23),
    ]


def at_the_limit(size: Size) -> list[Scenario]:
    """Every limit is reached exactly, from the first look on."""
    common = Scenario(
        "",
        MEAN,
        items(MEAN),
        size.n_jobs,
        size.most,
        drop=POLICY.max_drop,
        rise=POLICY.max_nll_increase,
        read_all_until=size.read_all_until,
    )
    few = replace(common, read_all_until=1)
    return [
        *(
            replace(common, key=f"b{i}", suite=suite, n_items=items(suite), seed=30 + i)
            for i, suite in enumerate(SUITES)
        ),
        replace(few, key="b-few", n_items=FEWEST_ITEMS, seed=40),
        replace(few, key="b-sticky", stickiness=0.9, seed=41),
        replace(few, key="b-restless", suite=replace(MEAN, discordance=0.3), seed=42),
    ]


def above_the_limit(size: Size) -> list[Scenario]:
    """The limit plus 2 points, from the first look on."""
    common = Scenario("", MEAN, items(MEAN), size.n_jobs, size.most, drop=ABOVE, stickiness=0.9)
    look = recommend(MEAN).look
    own = _items_of(OWN, "accuracy-4", look)
    text = _items_of(TEXT, "text-0", look)
    return [
        *(
            replace(common, key=f"c{i}", suite=suite, n_items=items(suite), seed=50 + i)
            for i, suite in enumerate((MEAN, OWN, TEXT))
        ),
        replace(common, key="c-fixed", stickiness=1.0, seed=60),
        replace(common, key="c-fresh", stickiness=0.0, seed=61),
        replace(
            common,
            key="c-own",
            suite=OWN,
            n_items=own,
            drops=(0.0, 0.0, 0.0, 0.0, ABOVE),
            seed=62,
        ),
        replace(common, key="c-text", suite=TEXT, n_items=text, drop=0.0, rise=RISE_ABOVE, seed=63),
        replace(common, key="c-pass", n_items=recommend(MEAN).items_for_pass or 0, seed=64),
    ]


def late(size: Size) -> list[Scenario]:
    """The limit plus 2 points, from a look drawn for each job; budgets for the first look and for the last."""
    found = []
    declared = recommend(MEAN).look
    for place, looks in enumerate((declared, *size.looks)):
        common = Scenario(
            f"late-{looks}",
            MEAN,
            items(MEAN),
            size.n_jobs,
            looks,
            drop=ABOVE,
            stickiness=0.9,
            is_late=True,
            after=20,
            seed=70 + place,
        )
        found.append(common)
        if looks > declared:
            own = items(MEAN, looks)
            found.append(replace(common, key=f"late-{looks}-own", n_items=own, seed=80 + place))
    return found


def predicted(size: Size) -> list[Scenario]:
    """One look with just the items that `power` says a pass, or a call at the first look, needs."""
    found = []
    for place, suite in enumerate(SUITES):
        mean = power(POLICY, suite.planned(POLICY)).mean
        if mean is None or mean.items_for_pass_80 is None or mean.items_for_regress_90 is None:
            raise ValueError(f"nothing is predicted for {suite.name}")
        n_jobs = PREDICTED_JOBS * size.n_jobs
        for_pass = Scenario(
            f"p-pass-{place}",
            suite,
            mean.items_for_pass_80,
            n_jobs,
            1,
            passes_at=(1,),
            seed=90 + place,
        )
        for_regress = Scenario(
            f"p-regress-{place}",
            suite,
            mean.items_for_regress_90,
            n_jobs,
            1,
            drop=ABOVE,
            read_all_until=1,
            seed=100 + place,
        )
        found += [for_pass, for_regress]
    return found


def everything(size: Size) -> list[Scenario]:
    """All of SENSOR.md."""
    return [
        *predicted(size),
        *above_the_limit(size),
        *undamaged(size),
        *at_the_limit(size),
        *late(size),
    ]


def _items_of(suite: Suite, benchmark: str, look: int) -> int:
    """That one benchmark's own limit needs, for damage that begins at this look or before."""
    return (
        power(POLICY, suite.planned(POLICY), look=look).benchmarks[benchmark].items_for_regress_90
        or 0
    )
