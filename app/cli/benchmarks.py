"""`retain benchmarks`: what models are watched by."""

from pathlib import Path
from typing import Annotated

import typer

from app.cli.client import ApiClient
from app.cli.output import show, show_json, show_table
from app.domain.benchmarks import BenchmarkKind, Scorer

benchmarks = typer.Typer(help="Benchmarks that models are watched by (HTTP).", no_args_is_help=True)


@benchmarks.command()
def add(
    name: Annotated[str, typer.Argument(help="A name that exists gets its next version.")],
    file: Annotated[str, typer.Argument(help="Items as JSONL: a local file, or a file-... id.")],
    scorer: Annotated[Scorer, typer.Option(help="How an item is scored.")],
    kind: Annotated[
        BenchmarkKind, typer.Option(help="general: must not drop; domain: what is learned.")
    ] = BenchmarkKind.GENERAL,
    limit: Annotated[
        int | None,
        typer.Option(min=2, help="Draw so many items, each subject in proportion. [default: all]"),
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Of the draw. [default: 0]")] = None,
    source: Annotated[str | None, typer.Option(help="Where the items come from.")] = None,
) -> None:
    """Upload items and register them as the next version of a benchmark."""
    with ApiClient() as client:
        file_id = file if file.startswith("file-") else client.upload(Path(file), "evals")
        body = {"name": name, "file": file_id, "kind": kind.value, "scorer": scorer.value}
        drawn = {"limit": limit, "seed": seed, "source": source}
        answer = client.post(
            "benchmarks", body | {key: value for key, value in drawn.items() if value is not None}
        )
    show(str(answer["id"]))


@benchmarks.command("list")
def list_(
    limit: Annotated[int, typer.Option(min=1, help="At most so many.")] = 100,
    as_json: Annotated[bool, typer.Option("--json", help="Print the server's answer.")] = False,
) -> None:
    """List the benchmarks that the key's project can name."""
    with ApiClient() as client:
        rows = list(client.iter_list("benchmarks", limit=limit))
    if as_json:
        show_json(rows)
        return
    columns = ("name", "version", "kind", "scorer", "num_items")
    show_table(
        [column.upper().replace("_", " ") for column in columns],
        [[row.get(column) for column in columns] for row in rows],
    )
