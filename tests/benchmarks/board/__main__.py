"""`python -m tests.benchmarks.board`: runs what is missing of the board, then writes BOARD.md and BOARD.png."""

import argparse
import fnmatch
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # torch reads its number of threads when it is imported
    from tests.benchmarks.board.schedule import Scope

ROOT = Path(__file__).resolve().parents[3]
CACHE = ROOT / ".retain" / "board"
REPORT = Path(__file__).resolve().parent.parent


def main(arguments: list[str]) -> int:
    """Runs and reports; 1 when a trial failed."""
    options = _parse(arguments)
    for name, value in (("OMP_NUM_THREADS", "1"), ("TOKENIZERS_PARALLELISM", "false")):
        os.environ[name] = value  # read when torch is first imported, here and in the children
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    from tests.benchmarks.board import schedule

    scope = _scope(options)
    if not options.report:
        try:
            schedule.run_board(scope, options.jobs, lambda line: print(line, flush=True))
        except KeyboardInterrupt:
            print("interrupted; the same command goes on from here", file=sys.stderr)
            return 130
        finally:
            write(options, scope)
    else:
        write(options, scope)
    failed = list(schedule.failures(scope))
    for name, error in failed:
        print(f"{name}: {error}", file=sys.stderr)
    return int(bool(failed))


def write(options: argparse.Namespace, scope: "Scope") -> None:
    """BOARD.md and BOARD.png from what there is."""
    from tests.benchmarks.board.plot import draw
    from tests.benchmarks.board.report import write_report
    from tests.benchmarks.board.standing import stand

    board = stand(scope)
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    command = "make board" if out == REPORT else "python -m tests.benchmarks.board"
    (out / "BOARD.md").write_text(write_report(board, command))
    if board.sizes:
        draw(board, out / "BOARD.png")
    print(f"wrote {out / 'BOARD.md'}", flush=True)


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.board", description=__doc__)
    parser.add_argument("--jobs", type=int, default=2, help="processes, of one thread each")
    parser.add_argument("--only", action="append", default=[], metavar="PATTERN")
    parser.add_argument("--seeds", type=int, default=5, metavar="N", help="reported seeds")
    parser.add_argument("--quick", action="store_true", help="2 seeds, 2 domains, no search")
    parser.add_argument("--report", action="store_true", help="run nothing, write what is there")
    parser.add_argument("--out", type=Path, help="directory of BOARD.md and BOARD.png")
    options = parser.parse_args(arguments)
    if options.quick:
        options.seeds = min(options.seeds, 2)
    if options.out is None:  # a part of the board must not replace the whole one
        whole = not options.quick and not options.only and options.seeds >= 5
        options.out = REPORT if whole else CACHE
    return options


def _scope(options: argparse.Namespace) -> "Scope":
    from tests.benchmarks.board.schedule import Scope
    from tests.benchmarks.board.table import FROZEN, METHODS, PLAIN

    always = (FROZEN, PLAIN)
    methods = tuple(
        m
        for m in METHODS
        if not options.only
        or m.name in always
        or any(fnmatch.fnmatch(m.name, f"*{pattern}*") for pattern in options.only)
    )
    seeds = tuple(range(1, options.seeds + 1))
    if options.quick:
        return Scope(CACHE, methods, seeds, num_stages=2, search=False)
    return Scope(CACHE, methods, seeds)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
