"""BOARD.md: the tables, what they say, and what is missing."""

from collections.abc import Callable, Iterable, Sequence

from tests.benchmarks.board.bootstrap import NUM_DRAWS
from tests.benchmarks.board.domains import DOMAINS, WRONG_LABELS
from tests.benchmarks.board.figures import Figures
from tests.benchmarks.board.findings import compare, findings, merit, targets
from tests.benchmarks.board.material import SIZES
from tests.benchmarks.board.methods import FULL_RATE, LORA_RATE, STEPS
from tests.benchmarks.board.selection import SEARCH_SEED, SEARCH_STAGES
from tests.benchmarks.board.standing import Board, Row
from workers.demo_model.skills import SEEN, UNSEEN


def write_report(board: Board, command: str) -> str:
    """The whole page; partial boards say what they lack."""
    parts = ["# The retention board", "", *_introduction(board, command), ""]
    if not board.rows or board.sizes == {}:
        parts += [
            "The frozen base and plain training are not both there yet; nothing can be compared.",
            "",
        ]
    else:
        parts += ["## What it says", "", *(f"- {line}" for line in findings(board)), ""]
        parts += ["## Targets", "", *_targets(board), ""]
        for title, rows in _sections(board):
            parts += [f"## {title}", "", *_tables(board, rows), ""]
    parts += ["## What is missing", "", *_missing(board), ""]
    return "\n".join(parts)


def _introduction(board: Board, command: str) -> list[str]:
    seconds = board.plain_step_seconds
    speed = "" if seconds is None else f" A plain step took {1000 * seconds:.0f} ms of CPU time."
    return [
        f"Written by `{command}`; picture: BOARD.png. Model: Llama, 172,352 parameters, 2 layers, pre-trained anew for",
        f"each of {len(board.seeds)} seeds ({', '.join(map(str, board.seeds))}) with its own rows and order; CPU,"
        f" float32, one thread.{speed}",
        "",
        f"- **Domains**, learnt in this order: {', '.join(d.name for d in DOMAINS[: board.num_stages])};"
        f" {SIZES.training_rows} rows and {SIZES.domain_items} items each, {100 * WRONG_LABELS:.0f} % of all"
        f" labels wrong. {STEPS} steps a domain, batch 32, cosine, AdamW, peak rate {FULL_RATE:g} (LoRA"
        f" {LORA_RATE:g}). Accuracy is exact match of the greedy answer over the whole vocabulary.",
        f"- **General skills**: seen ({', '.join(SEEN)}; {SIZES.general_rows} rows each may feed strategies) and"
        f" **unseen** ({', '.join(UNSEEN)}; {SIZES.unseen_items} items each, in no general row). EM: exact match,"
        " MC: multiple choice. Targets apply to unseen.",
        "- **Single domain** is read after the first of the sequence; every method is at its start the same run.",
        f"- **Search**: the same budget for every method with knobs: four settings, the default included, on seed"
        f" {SEARCH_SEED} alone, over the first {SEARCH_STAGES} domains; chosen is the highest harmonic mean of domain accuracy and"
        " exact match on unseen skills. The seeds reported here were never searched on.",
        f"- **Intervals**: 95 %, two-level bootstrap (seeds, then items), {NUM_DRAWS} draws. With"
        f" {len(board.seeds)} seeds they are rough, and a maximum over domains is biased upward.",
        "- **Time**: CPU seconds of training with all preparation (Fisher, caches), without scoring, over plain's.",
        "  **Memory**: weights, gradients, optimiser, strategies' tensors and the teacher's copy, over plain's;"
        " activations and rows left out.",
    ]


def _sections(board: Board) -> Iterable[tuple[str, list[Row]]]:
    methods = board.measured("strategy", "combination")
    yield "With general rows", [row for row in methods if row.general_rows]
    yield "Without general rows", [row for row in methods if not row.general_rows]
    yield (
        "Other libraries on the same models, rows, items and search budget",
        board.measured("peer"),
    )
    yield "Controls", board.measured("control")
    yield "Plain training at other rates and lengths", board.measured("curve")


def _tables(board: Board, rows: Sequence[Row]) -> list[str]:
    if not rows:
        return ["Nothing yet."]
    if rows[0].method.group in ("strategy", "combination"):
        rows = sorted(rows, key=lambda row: -_merit(row))
    single: list[tuple[str, Callable[[Row, Figures], str]]] = [
        ("method", lambda r, _: r.method.name),
        ("setting", lambda r, _: r.setting),
        ("domain %", lambda _, f: f.single_domain.shown()),
        ("unseen EM drop", lambda _, f: f.single_em_drop.shown()),
        ("unseen MC drop", lambda _, f: f.single_mc_drop.shown()),
        ("seen EM drop", lambda _, f: f.single_seen_drop.shown()),
        ("plain's EM drop there", lambda _, f: _matched(board, f)),
        ("verdict", lambda _, f: compare(board, f).verdict),
        ("time", lambda _, f: f"{f.time_ratio:.2f}"),
        ("memory", lambda r, f: "-" if r.method.group == "peer" else f"{f.memory_ratio:.2f}"),
    ]
    sequence: list[tuple[str, Callable[[Row, Figures], str]]] = [
        ("method", lambda r, _: r.method.name),
        ("final domain %", lambda _, f: f.final_domain.shown()),
        ("just learnt %", lambda _, f: f.learning_domain.shown()),
        ("final, % of plain just learnt", lambda _, f: f.of_plain_learning.shown()),
        ("backward transfer", lambda _, f: f.backward_transfer.shown()),
        ("unseen EM decay %: mean", lambda _, f: f.decay_mean.shown()),
        ("worst", lambda _, f: f.decay_worst.shown()),
        ("at the end", lambda _, f: f.decay_last.shown()),
        ("unseen MC decay %: mean", lambda _, f: f.decay_mc_mean.shown()),
        ("earlier domains lost %: mean", lambda _, f: f.lost_mean.shown()),
        ("worst", lambda _, f: f.lost_worst.shown()),
    ]
    return [
        "One domain (points; \"plain's EM drop there\" is plain training's at the same accuracy):",
        "",
        *_table(rows, single),
        "",
        f"{board.num_stages} domains in a row:",
        "",
        *_table(rows, sequence),
    ]


def _table(
    rows: Sequence[Row], columns: Sequence[tuple[str, Callable[[Row, Figures], str]]]
) -> list[str]:
    lines = [" | ".join(title for title, _ in columns), " | ".join("---" for _ in columns)]
    lines += [
        " | ".join(shown(row, row.figures) for _, shown in columns) for row in rows if row.figures
    ]
    return [f"| {line} |" for line in lines]


def _matched(board: Board, figures: Figures) -> str:
    matched = compare(board, figures).plain_drop
    return "never reached" if matched is None else f"{100 * matched:.1f}"


def _merit(row: Row) -> float:
    return 0.0 if row.figures is None else merit(row.figures)


def _targets(board: Board) -> list[str]:
    rows = [f"| {t.name} | {t.wanted} | {t.ours} | {t.verdict} |" for t in targets(board)]
    if not rows:
        return ["Nothing to hold against them yet."]
    return [
        "The combination shown meets the most of them, chosen after the fact from the reported seeds; `pass` means",
        "that the whole interval holds, `met, not proven` that the value does.",
        "",
        "| target | wanted | ours | verdict |",
        "| --- | --- | --- | --- |",
        *rows,
    ]


def _missing(board: Board) -> list[str]:
    lines = [f"- {row.method.name}: {row.status}." for row in board.unmeasured()]
    lines.append(
        "- peft has no O-LoRA (its `olora` is an initialisation); memory of other libraries isn't measured."
    )
    unfinished = [r.method.name for r in board.rows if "unfinished" in r.setting]
    if unfinished:
        lines.append(f"- Search unfinished, so the setting may change: {', '.join(unfinished)}.")
    return lines
