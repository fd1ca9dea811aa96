"""What is to be done, in which order, by how many processes; goes on where it was interrupted."""

import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from tests.benchmarks.board.cells import Cache, Cell, base_fingerprint
from tests.benchmarks.board.material import SIZES, base_directory, build_base, load_material
from tests.benchmarks.board.methods import Method, NotBuilt, resolve
from tests.benchmarks.board.selection import SEARCH_SEED, SEARCH_STAGES, choose

TRIAL_SECONDS, BASE_SECONDS = 20.0, 70.0  # of a core, until there are measurements
Log = Callable[[str], None]


@dataclass(frozen=True)
class Scope:
    """Which part of the board is run.

    Args:
        root: Of base models and results.
        methods: Those that are run and reported.
        seeds: Of the trials that are reported.
        num_stages: Domains of the sequence.
        search: Whether settings are searched; else the defaults stand.
    """

    root: Path
    methods: tuple[Method, ...]
    seeds: tuple[int, ...]
    num_stages: int = 4
    search: bool = True

    @property
    def cache(self) -> Cache:
        """Of this scope's results."""
        return Cache(self.root / "trials")

    def built(self) -> tuple[Method, ...]:
        """Methods whose strategies this version of the program knows and whose settings it accepts."""
        return tuple(m for m in self.methods if why_left_out(m) is None)

    def search_cells(self, method: Method) -> list[Cell]:
        """None where there is nothing to choose."""
        if not self.search or len(method.settings) < 2:
            return []
        return [Cell(method, s, SEARCH_SEED, SEARCH_STAGES) for s in method.settings]

    def final_cells(self, method: Method) -> list[Cell]:
        """One a seed, at the setting that the search chose; the default's until it is done."""
        setting = method.settings[choose(self.cache, self.search_cells(method))]
        return [Cell(method, setting, seed, self.num_stages) for seed in self.seeds]


def why_left_out(method: Method) -> str | None:
    """Why a method can't be run at all by this version; None where it can."""
    try:
        for setting in method.settings:
            resolve(method, setting)
    except NotBuilt as error:
        return f"not built: {error}"
    except ValidationError as error:
        return f"configuration refused: {error.errors()[0]['msg']}"
    return None


def run_board(scope: Scope, jobs: int, log: Log) -> None:
    """Runs all that is missing: base models, then searches, then the reported seeds."""
    methods = scope.built()
    seeds = [SEARCH_SEED] if any(scope.search_cells(m) for m in methods) else []
    missing = [s for s in (*seeds, *scope.seeds) if not _directory(scope.root, s).exists()]
    search = [cell for m in methods for cell in scope.search_cells(m)]
    final = [cell for m in methods for cell in scope.final_cells(m)]
    left = _missing(scope.cache, search + final)
    seconds = BASE_SECONDS * len(missing) + sum(_expected(scope.cache, left))
    log(
        f"{len(missing)} base models and {len(left)} of {len(_unique(search + final))} trials to do:"
        f" about {seconds / jobs / 60:.0f} min on {jobs} quiet cores"
    )
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        _run_all(pool, [(_make_base, (scope.root, seed)) for seed in missing], None, log)
        _run_cells(pool, scope, search, jobs, log)
        chosen = [cell for m in methods for cell in scope.final_cells(m)]
        _run_cells(pool, scope, chosen, jobs, log)


def _run_cells(
    pool: ProcessPoolExecutor, scope: Scope, cells: Sequence[Cell], jobs: int, log: Log
) -> None:
    todo = _missing(scope.cache, cells)
    progress = _Progress(todo, jobs, log, _expected(scope.cache, todo))
    _run_all(pool, [(_run_cell, (scope.root, cell)) for cell in todo], progress, log)


def _unique(cells: Sequence[Cell]) -> list[Cell]:
    return list({cell.key(): cell for cell in cells}.values())


def _missing(cache: Cache, cells: Sequence[Cell]) -> list[Cell]:
    return [cell for cell in _unique(cells) if cache.load(cell) is None]


def _expected(cache: Cache, cells: Sequence[Cell]) -> list[float]:
    """Seconds of a core for each: by what is known of the same method, else of all."""
    known: dict[str, list[float]] = {}
    for path in cache.directory.glob("*.json"):
        found = _seconds_of(path)
        known.setdefault(found[0], []).append(found[1])
    everything = [s for own in known.values() for s in own]
    default = statistics.mean(everything) if everything else TRIAL_SECONDS / 4
    means = {name: statistics.mean(own) for name, own in known.items()}
    return [cell.num_stages * means.get(cell.method.name, default) for cell in cells]


@lru_cache(maxsize=4096)
def _seconds_of(path: Path) -> tuple[str, float]:
    content = json.loads(path.read_text())
    return str(content["method"]), float(content["cpu_seconds"]) / int(content["num_stages"])


@dataclass
class _Progress:
    cells: Sequence[Cell]
    jobs: int
    log: Log
    expected: Sequence[float]
    done: int = 0

    def __post_init__(self) -> None:
        self._started = time.monotonic()
        self._left = sum(self.expected)
        self._of = {cell.key(): s for cell, s in zip(self.cells, self.expected, strict=True)}
        self._total = max(self._left, 1e-9)

    def tell(self, cell: Cell, outcome: str) -> None:
        """One line a trial, with the time that the rest should take at the pace so far."""
        self.done += 1
        self._left -= self._of[cell.key()]
        elapsed = time.monotonic() - self._started
        pace = elapsed / max(self._total - self._left, 1e-9)
        self.log(
            f"{self.done}/{len(self.cells)}  {cell.method.name} ({cell.setting.label}), seed {cell.seed},"
            f" {cell.num_stages} domains: {outcome}; {pace * self._left / 60:.0f} min left"
        )


def _run_all(
    pool: ProcessPoolExecutor,
    calls: Sequence[tuple[Callable[..., Any], tuple[Any, ...]]],
    progress: _Progress | None,
    log: Log,
) -> None:
    futures: dict[Future[Any], tuple[Any, ...]] = {
        pool.submit(function, *arguments): arguments for function, arguments in calls
    }
    try:
        for future in as_completed(futures):
            outcome = future.result()
            if progress is None:
                log(str(outcome))
            else:
                progress.tell(futures[future][1], str(outcome))
    except BaseException:
        for future in futures:
            future.cancel()
        raise


def _directory(root: Path, seed: int) -> Path:
    return base_directory(root, seed, base_fingerprint())


def _make_base(root: Path, seed: int) -> str:
    import torch

    torch.set_num_threads(1)
    started = time.monotonic()
    build_base(_directory(root, seed), seed, lambda *_: None, SIZES)
    return f"base model of seed {seed}: {time.monotonic() - started:.0f} s"


@lru_cache(maxsize=2)
def load_seed(root: Path, seed: int) -> tuple[Any, Any]:
    """A seed's material and its items, tokenised once a process."""
    from tests.benchmarks.board.trial import prepare_items

    material = load_material(_directory(root, seed), seed)
    return material, prepare_items(material)


def _run_cell(root: Path, cell: Cell) -> str:
    """In a process of its own: one trial, kept on disk whatever becomes of it."""
    from tests.benchmarks.board.trial import run_trial

    cache = Cache(root / "trials")
    try:
        material, items = load_seed(root, cell.seed)
        result = run_trial(cell.method, cell.setting, material, items, cell.num_stages)
    except Exception as error:  # noqa: BLE001 - a broken method must not end the board; the report shows it
        traceback.print_exc(file=sys.stderr)
        cache.save_failure(cell, f"{type(error).__name__}: {error}")
        return f"FAILED, {type(error).__name__}: {error}"
    cache.save(cell, result)
    return f"{result['cpu_seconds']:.0f} s"


def failures(scope: Scope) -> Iterator[tuple[str, str]]:
    """(method, error) of trials whose last try failed."""
    for method in scope.built():
        for cell in [*scope.search_cells(method), *scope.final_cells(method)]:
            error = scope.cache.failure(cell)
            if error is not None:
                yield method.name, error
                break
