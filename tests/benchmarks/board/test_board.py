"""The board's table, its results on disk, its choices and its page, with made-up trials."""

import dataclasses
import itertools

import pytest

from tests.benchmarks.board import cells, findings
from tests.benchmarks.board.bootstrap import Estimate
from tests.benchmarks.board.cells import Cache, Cell, trial_fingerprint
from tests.benchmarks.board.methods import Method, Setting, resolve, uses_general_rows
from tests.benchmarks.board.plot import draw, pareto, spread
from tests.benchmarks.board.report import write_report
from tests.benchmarks.board.schedule import Scope, why_left_out
from tests.benchmarks.board.selection import SEARCH_SEED, choose, merit
from tests.benchmarks.board.standing import stand
from tests.benchmarks.board.table import FROZEN, METHODS, PLAIN
from tests.benchmarks.board.test_figures import trial

BY_NAME = {method.name: method for method in METHODS}
SEARCHED = [m for m in METHODS if m.group in ("strategy", "combination")]


def make_scope(tmp_path, *names):
    methods = tuple(BY_NAME[name] for name in (FROZEN, PLAIN, *names))
    return Scope(tmp_path, methods, seeds=(1, 2, 3), num_stages=2)


def fill(scope, name, unseen, domains, **costs):
    """Results of a method on all seeds."""
    for cell in scope.final_cells(BY_NAME[name]):
        result = {**trial(unseen, domains, **costs), "steps": 10, "cpu_seconds": 2.0}
        scope.cache.save(cell, result)


def fill_references(scope):
    fill(scope, FROZEN, [1.0, 1.0], [[0.0], [0.0, 0.0]])
    fill(scope, PLAIN, [0.5, 0.2], [[0.9], [0.3, 0.9]])


def test_names_are_unique():
    assert len(BY_NAME) == len(METHODS)


@pytest.mark.parametrize("method", SEARCHED, ids=lambda m: m.name)
def test_every_method_has_the_same_search_budget(method):
    assert len(method.settings) == 4
    assert method.settings[0].rate == 1.0
    assert len({setting.label for setting in method.settings}) == 4


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_every_configuration_is_one_that_a_job_may_send(method):
    assert why_left_out(method) is None
    keys = {Cell(method, setting, 1, 4).key() for setting in method.settings}
    assert len(keys) == len(method.settings)


def test_a_strategy_that_is_not_there_is_left_out_with_a_clear_line(tmp_path):
    method = Method("new", ({"type": "not_yet_written"},))
    scope = Scope(tmp_path, (BY_NAME[FROZEN], BY_NAME[PLAIN], method), (1,))
    assert scope.built() == scope.methods[:2]
    assert stand(scope).rows[2].status == "not built: not_yet_written"


def test_a_refused_configuration_is_left_out(tmp_path):
    method = Method("odd", ({"type": "ewc", "fisher_clip": 2.0},))
    assert "configuration refused" in str(why_left_out(method))


def test_strength_is_scaled_from_the_default():
    method = Method("both", ({"type": "ewc"}, {"type": "replay", "strength": 0.2}))
    (ewc, replay) = resolve(method, Setting("x", strength={"ewc": 10.0}))
    assert (ewc.strength, replay.strength) == (1000.0, 0.2)


def test_general_rows_go_to_those_that_need_them():
    assert uses_general_rows(BY_NAME["replay"])
    assert not uses_general_rows(BY_NAME["l2sp"])
    assert not uses_general_rows(BY_NAME["replay (earlier domains alone)"])


def test_a_trial_is_named_by_what_it_depends_on():
    plain = BY_NAME[PLAIN]
    cell = Cell(plain, plain.settings[0], 1, 4)
    renamed = dataclasses.replace(plain, name="another name", group="curve")
    assert Cell(renamed, plain.settings[0], 1, 4).key() == cell.key()
    others = [
        dataclasses.replace(cell, seed=2),
        dataclasses.replace(cell, num_stages=2),
        dataclasses.replace(cell, setting=Setting("slower", rate=0.5)),
    ]
    assert len({cell.key(), *(other.key() for other in others)}) == 4


def test_code_of_one_strategy_leaves_the_others_results_alone(tmp_path, monkeypatch):
    before = cells.fingerprint(["tests.benchmarks.board.packing"])
    source = tmp_path / "packing.py"
    found = cells._find("tests.benchmarks.board.packing")
    assert found is not None
    original = found.read_text()
    monkeypatch.setattr(cells, "_find", lambda _: source)
    source.write_text(f"# a comment\n{original}")
    assert cells.fingerprint(["tests.benchmarks.board.packing"]) == before
    source.write_text(original.replace("packbits", "unpackbits"))
    assert cells.fingerprint(["tests.benchmarks.board.packing"]) != before
    monkeypatch.undo()
    assert trial_fingerprint(("ewc",)) != trial_fingerprint(("replay",))


def test_a_failed_trial_is_told_and_forgotten_once_it_succeeds(tmp_path):
    cache = Cache(tmp_path)
    cell = Cell(BY_NAME[PLAIN], Setting(), 1, 2)
    cache.save_failure(cell, "ValueError: no rows")
    assert cache.failure(cell) == "ValueError: no rows"
    assert cache.load(cell) is None
    cache.save(cell, {"points": []})
    assert cache.failure(cell) is None
    assert cache.load(cell) is not None


def test_the_search_takes_the_best_of_both_sides(tmp_path):
    scope = make_scope(tmp_path, "l2sp")
    outcomes = [(1.0, 0.3), (0.9, 0.9), (0.2, 1.0), (0.8, 0.8)]
    for cell, (general, domain) in zip(scope.search_cells(BY_NAME["l2sp"]), outcomes, strict=True):
        scope.cache.save(cell, trial([general] * 2, [[domain], [domain, domain]]))
    assert choose(scope.cache, scope.search_cells(BY_NAME["l2sp"])) == 1
    assert [c.setting.label for c in scope.final_cells(BY_NAME["l2sp"])] == ["strength /10"] * 3
    assert SEARCH_SEED not in scope.seeds


def test_merit_is_the_harmonic_mean():
    assert merit(trial([0.5], [[1.0]])) == pytest.approx(2 / 3)


def test_an_empty_board_says_that_there_is_nothing(tmp_path):
    page = write_report(stand(make_scope(tmp_path, "l2sp")), "make board")
    assert "nothing can be compared" in page
    assert "l2sp: not run yet: 0 of 3 seeds" in page


def test_a_partial_board_reports_what_is_there(tmp_path):
    scope = make_scope(tmp_path, "l2sp", "ewc", "freeze")
    fill_references(scope)
    fill(scope, "l2sp", [0.99, 0.99], [[0.9], [0.85, 0.9]])
    fill(scope, "freeze", [0.4, 0.1], [[0.9], [0.2, 0.9]])
    page = write_report(stand(scope), "make board")
    assert (
        "Keep more of the unseen skills than plain training at the same accuracy (one domain): l2sp"
        in page
    )
    assert "they do not help: freeze" in page
    assert "ewc: not run yet" in page
    assert "search unfinished" in page
    draw(stand(scope), tmp_path / "BOARD.png")
    assert (tmp_path / "BOARD.png").read_bytes().startswith(b"\x89PNG")


def test_over_regularising_is_told(tmp_path):
    scope = make_scope(tmp_path, "l2sp")
    fill_references(scope)
    fill(scope, "l2sp", [1.0, 1.0], [[0.4], [0.3, 0.4]])
    page = write_report(stand(scope), "make board")
    assert "too costly here: l2sp" in page


def test_targets_are_judged_by_the_interval(tmp_path):
    scope = make_scope(tmp_path, "ewc + replay")
    fill_references(scope)
    fill(scope, "ewc + replay", [0.97, 0.99], [[0.9], [0.9, 0.9]])
    verdicts = {t.name.split(": ")[1]: t.verdict for t in findings.targets(stand(scope))}
    assert verdicts["decay of unseen skills, mean over the domains"] == "FAIL"
    assert verdicts["final domain accuracy, of plain's just after each domain"] == "pass"
    unsure = findings._at_least("x", Estimate(0.985, 0.97, 0.99), 0.98)
    assert (unsure.verdict, unsure.ours) == ("met, not proven", "98.5 [97.0, 99.0] %")


def test_plain_at_the_same_accuracy_lies_between_its_points():
    points = [(0.5, 0.0), (0.8, 0.3), (0.9, 0.2)]
    assert findings.drop_at(points, 0.65) == pytest.approx(0.15)
    assert findings.drop_at(points, 0.8) == pytest.approx(0.2)  # learning more costs less here
    assert findings.drop_at(points, 0.95) is None


def test_the_front_holds_what_nothing_beats():
    assert pareto([(1, 1), (2, 0.5), (0.5, 2), (0.4, 1.5)]) == [(0.5, 2), (1, 1), (2, 0.5)]


def test_labels_keep_their_order_and_distance():
    placed = spread([1.0, 1.0, 1.1, 5.0], 0.5)
    assert all(b - a >= 0.5 - 1e-9 for a, b in itertools.pairwise(placed))
