"""Where each method stands: its figures, or what is still missing."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tests.benchmarks.board.bootstrap import TwoLevelBootstrap
from tests.benchmarks.board.figures import Figures, Reference, Result, item_sizes, measure
from tests.benchmarks.board.methods import Method, uses_general_rows
from tests.benchmarks.board.peers import PEERS, final_cells
from tests.benchmarks.board.schedule import Scope, why_left_out
from tests.benchmarks.board.selection import is_complete
from tests.benchmarks.board.table import FROZEN, PLAIN


@dataclass(frozen=True)
class Row:
    """A method on the board; `figures` are None while trials are missing, and `status` says what is.

    Args:
        setting: Label of the setting that the search chose.
        general_rows: Whether it was given general rows.
        status: Empty where all is there.
    """

    method: Method
    figures: Figures | None
    setting: str
    general_rows: bool
    status: str


@dataclass(frozen=True)
class Board:
    """All rows in the order of the table, and what the figures rest on."""

    rows: tuple[Row, ...]
    seeds: tuple[int, ...]
    num_stages: int
    sizes: dict[str, int]
    plain_step_seconds: float | None

    def find(self, name: str) -> Row | None:
        """The row of a method."""
        return next((row for row in self.rows if row.method.name == name), None)

    def measured(self, *groups: str) -> list[Row]:
        """Rows with figures, of these groups."""
        return [r for r in self.rows if r.figures is not None and r.method.group in groups]

    def unmeasured(self) -> list[Row]:
        """Rows without figures."""
        return [row for row in self.rows if row.figures is None]


def stand(scope: Scope) -> Board:
    """Reads what there is of a scope; nothing is run."""
    methods = {method.name: method for method in scope.methods}
    base = _load(scope, methods[FROZEN])
    plain = _load(scope, methods[PLAIN])
    reference = None
    sizes: dict[str, int] = {}
    if base is not None and plain is not None:
        sizes = item_sizes(base[0])
        bootstrap = TwoLevelBootstrap(len(scope.seeds), sizes)
        reference = Reference(bootstrap, base, plain)
    rows = tuple(_row(scope, method, reference) for method in scope.methods)
    rows += tuple(_peer_row(scope, method, reference) for method in PEERS)
    step = None
    if plain is not None:
        step = sum(r["train_cpu_seconds"] for r in plain) / sum(r["steps"] for r in plain)
    return Board(rows, scope.seeds, scope.num_stages, sizes, step)


def _row(scope: Scope, method: Method, reference: Reference | None) -> Row:
    left_out = why_left_out(method)
    if left_out is not None:
        return Row(method, None, "", general_rows=False, status=left_out)
    search = scope.search_cells(method)
    cells = scope.final_cells(method)
    general = uses_general_rows(method)
    label = cells[0].setting.label
    results = _load(scope, method)
    if results is None or reference is None:
        return Row(method, None, label, general, _missing(scope, method))
    if not is_complete(scope.cache, search):
        label += ", search unfinished"
    return Row(method, measure(results, reference), label, general, "")


def _peer_row(scope: Scope, method: Method, reference: Reference | None) -> Row:
    cells = final_cells(method, scope.cache, scope.seeds, scope.num_stages)
    results: list[Any] = [scope.cache.load(cell) for cell in cells]
    general = uses_general_rows(method)
    if reference is None or any(result is None for result in results):
        status = "not run: `python -m tests.benchmarks.board.peers` where its library is installed"
        return Row(method, None, "", general, status)
    label = f"{cells[0].setting.label} ({results[0]['package']})"
    return Row(method, measure(results, reference), label, general, "")


def _load(scope: Scope, method: Method) -> Sequence[Result] | None:
    """Results of all seeds, or None while one is missing."""
    found: list[Any] = [scope.cache.load(cell) for cell in scope.final_cells(method)]
    return None if any(result is None for result in found) else found


def _missing(scope: Scope, method: Method) -> str:
    cells = scope.final_cells(method)
    errors = [e for c in [*scope.search_cells(method), *cells] if (e := scope.cache.failure(c))]
    if errors:
        return f"failed: {errors[0]}"
    done = sum(scope.cache.load(cell) is not None for cell in cells)
    if done == len(cells):
        return "the frozen base or plain training is not there to compare with"
    return f"not run yet: {done} of {len(cells)} seeds"
