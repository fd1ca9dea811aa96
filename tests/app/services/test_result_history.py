"""Pages, points and the latest of results against a plain filter over all rows in Python."""

import math
import random
from datetime import UTC, datetime
from itertools import product
from uuid import uuid4

import pytest

from app.db.models import Benchmark, BenchmarkVersion, Evaluation, Project
from app.db.repositories.results import Window
from app.errors import BadRequest, NotFound
from app.services.results_query import WantedResults, list_points, list_results
from tests.factories import (
    make_base_model,
    make_benchmark,
    make_job,
    make_model_version,
    make_project,
    make_second_version,
)


class World:
    """Two projects with results of every kind in one order, and what each may see."""

    def __init__(self, session) -> None:
        self.session = session
        self.own, self.rival = make_project(session), make_project(session)
        self.base = make_base_model(session, name="tiny")
        shared = make_benchmark(session, None, name="mc")
        self.versions = {
            "shared": shared,
            "second": make_second_version(session, shared),
            "own": make_benchmark(session, self.own, name="mine"),
            "namesake": make_benchmark(session, self.own, name="mc"),
            "theirs": make_benchmark(session, self.rival, name="mc"),
        }
        self.rows: list[Evaluation] = []
        self.models = {
            project.id: [make_model_version(session, make_job(session, project)) for _ in range(2)]
            for project in (self.own, self.rival)
        }
        self._fill(random.Random(4))

    def _fill(self, generator: random.Random) -> None:
        for n in range(160):
            project = generator.choice([self.own, self.own, self.rival, None])
            kind = generator.choice(["none", "shared", "second", "own", "namesake", "theirs"])
            if project is not None and kind == ("theirs" if project is self.own else "own"):
                kind = "none"  # nobody measures on what they can't see
            if project is self.rival and kind == "namesake":
                kind = "theirs"
            self.rows.append(self._row(n, generator, project, self.versions.get(kind)))

    def _row(
        self,
        n: int,
        generator: random.Random,
        project: Project | None,
        version: BenchmarkVersion | None,
    ) -> Evaluation:
        label = generator.choice(["mc", "mc@1", "mc@2", "mine", "x", "x@1"])
        if project is None:
            subject = ("base_model", f"{self.base.sha256}/{generator.choice(['own', 'plain'])}")
        else:
            subject = ("model", generator.choice(self.models[project.id]).name)
        row = Evaluation(
            project_id=None if project is None else project.id,
            subject_type=subject[0],
            subject_key=subject[1],
            benchmark_version_id=None if version is None else version.id,
            benchmark=label,
            metric="accuracy",
            purpose=generator.choice(["monitor", "monitor", "gate"]),
            source="external",
            step=generator.choice([n, None]),
            value=generator.choice([n / 7, math.nan, math.inf]),
            measured_at=datetime.fromtimestamp(1_700_000_000 + n + 0.75, UTC),
        )
        self.session.add(row)
        self.session.flush()
        return row

    def expected(self, wanted: WantedResults, *, is_newest_first: bool) -> list[Evaluation]:
        """All that the own project sees of what is wanted, by a plain filter."""
        found = [row for row in self.rows if self._is_seen(row) and self._is_wanted(row, wanted)]
        if wanted.is_latest:
            found = list({(row.subject_key, row.benchmark): row for row in found}.values())
        return sorted(found, key=lambda row: row.seq, reverse=is_newest_first)

    def _benchmark(self, row: Evaluation) -> tuple[Benchmark, int] | None:
        if row.benchmark_version_id is None:
            return None
        version = self.session.get_one(BenchmarkVersion, row.benchmark_version_id)
        return self.session.get_one(Benchmark, version.benchmark_id), version.version

    def _is_seen(self, row: Evaluation) -> bool:
        found = self._benchmark(row)
        is_public = found is None or found[0].project_id in {None, self.own.id}
        return row.project_id == self.own.id or (row.project_id is None and is_public)

    def _is_wanted(self, row: Evaluation, wanted: WantedResults) -> bool:
        if wanted.purpose not in {None, row.purpose}:
            return False
        if wanted.subject_id is not None and row.subject_key.partition("/")[0] not in {
            wanted.subject_id,
            self.base.sha256 if wanted.subject_id == "tiny" else "",
        }:
            return False
        if wanted.benchmark is None or row.benchmark == wanted.benchmark:
            return True
        found, (name, _, number) = self._benchmark(row), wanted.benchmark.partition("@")
        if found is None or found[0].name != name:
            return False
        return len(number) > 9 or not number.isdigit() or found[1] == int(number)


@pytest.fixture
def world(session) -> World:
    return World(session)


def pages(world: World, wanted: WantedResults, *, limit: int, is_newest_first: bool):
    """Everything, page by page."""
    found, after, has_more = [], None, True
    while has_more:
        window = Window(after, limit, is_newest_first)
        page, has_more = list_results(world.session, world.own.id, wanted, window)
        assert len(page) == limit or not has_more
        found += page
        after = page[-1].id if page else None
    return found


BENCHMARKS = [None, "mc", "mc@1", "mc@2", "mc@x", "mine", "x", "x@1", "nothing", "mc@99999999999"]


@pytest.mark.parametrize("is_newest_first", [True, False])
@pytest.mark.parametrize("is_latest", [True, False])
def test_pages_are_what_a_plain_filter_finds(world, is_newest_first, is_latest) -> None:
    subjects = [world.models[world.own.id][0].name, "tiny", *([] if is_latest else [None])]
    sizes = set()
    for subject, benchmark, purpose in product(subjects, BENCHMARKS, [None, "gate"]):
        wanted = WantedResults(subject, benchmark, purpose, is_latest)
        expected = world.expected(wanted, is_newest_first=is_newest_first)
        found = pages(world, wanted, limit=17, is_newest_first=is_newest_first)
        assert [row.id for row in found] == [row.id for row in expected], wanted
        sizes.add(len(expected))
    assert {0, max(sizes)} <= sizes
    assert max(sizes) > (5 if is_latest else 90)


def test_points_are_the_same_rows_as_numbers_alone(world) -> None:
    for subject, benchmark in product([None, "tiny"], ["mc", "mc@2", "x", "nothing"]):
        wanted = WantedResults(subject, benchmark)
        expected = world.expected(wanted, is_newest_first=False)
        steps, values, times, after, has_more = [], [], [], None, True
        while has_more:
            points = list_points(world.session, world.own.id, wanted, Window(after, 5, False))
            steps += points.steps
            values += points.values
            times += points.measured_at
            after, has_more = points.ids[-1] if points.ids else None, points.has_more
        assert steps == [row.step for row in expected]
        assert values == [row.value if math.isfinite(row.value) else None for row in expected]
        assert times == [int(row.measured_at.timestamp()) for row in expected]


def test_a_page_stays_what_it_is_when_results_come_in(world) -> None:
    wanted = WantedResults(None, "mc")
    first, _ = list_results(world.session, world.own.id, wanted, Window(None, 10, True))
    window = Window(first[-1].id, 10, True)
    second, _ = list_results(world.session, world.own.id, wanted, window)
    world.rows.append(world._row(200, random.Random(0), world.own, world.versions["shared"]))
    again, _ = list_results(world.session, world.own.id, wanted, window)
    assert [row.id for row in again] == [row.id for row in second]


def test_what_is_foreign_or_unnamed_is_refused(world) -> None:
    foreign = next(row for row in world.rows if row.project_id == world.rival.id)
    hidden = next(
        row
        for row in world.rows
        if row.project_id is None and row.benchmark_version_id == world.versions["theirs"].id
    )
    for cursor in (foreign.id, hidden.id, uuid4()):
        for read in (list_results, list_points):
            with pytest.raises(NotFound) as refused:
                read(world.session, world.own.id, WantedResults(None, "mc"), Window(cursor, 5))
            assert refused.value.param == "after"
    theirs = world.models[world.rival.id][0].name
    for is_latest in (False, True):
        wanted = WantedResults(theirs, is_latest=is_latest)
        with pytest.raises(NotFound):
            list_results(world.session, world.own.id, wanted, Window())
    with pytest.raises(BadRequest, match="subject_id"):
        list_results(world.session, world.own.id, WantedResults(is_latest=True), Window())
    with pytest.raises(BadRequest, match="benchmark"):
        list_points(world.session, world.own.id, WantedResults(theirs), Window())
