"""`retain benchmarks`: what models are watched by."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from app.cli.client import ApiClient
from app.cli.operator import DataDir, open_database, settings_for
from app.cli.output import show, show_json, show_table, tell
from app.db.session import transaction
from app.domain.benchmarks import BenchmarkKind, Scorer
from app.services.audit import sign
from app.services.keys import DEFAULT_PROJECT, ensure_project
from app.services.watched import list_required, release_benchmark, require_benchmark

benchmarks = typer.Typer(
    help="Benchmarks that models are watched by (HTTP; require and release: operator).",
    no_args_is_help=True,
)
Project = Annotated[str, typer.Option(help="The project whose jobs it binds.")]


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


@benchmarks.command("import-task")
def import_task(
    name: Annotated[str, typer.Argument(help="A task or group of lm-evaluation-harness.")],
    out: Annotated[Path, typer.Option(help="Where the items go, as JSONL.")],
    include_path: Annotated[
        Path | None, typer.Option(help="A directory with task files. [default: the harness's own]")
    ] = None,
    scorer: Annotated[
        Scorer | None,
        typer.Option(help="In place of the task's metric, where none here equals it."),
    ] = None,
) -> None:
    """Write a harness task's documents as benchmark items; nothing is downloaded."""
    command = [sys.executable, "-m", "workers.evaluation.harness", name, "--out", str(out)]
    command += [] if include_path is None else ["--include-path", str(include_path)]
    command += [] if scorer is None else ["--scorer", scorer.value]
    # What the harness says of itself goes to standard error as it stands.
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)  # noqa: S603
    if done.returncode != 0:
        raise typer.Exit(1)
    told = json.loads(done.stdout.splitlines()[-1])
    tell(f"{told['num_items']:,} items; documents that occurred again: {told['num_repeated']}.")
    tell(
        f"retain benchmarks add {name} {out} --scorer {told['scorer']} --source '{told['source']}'"
    )
    show(str(out))


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


@benchmarks.command()
def require(
    name: Annotated[str, typer.Argument(help="NAME (its newest version now) or NAME@3.")],
    project: Project = DEFAULT_PROJECT,
    weight: Annotated[float, typer.Option(help="In the general mean, at least.")] = 1.0,
    max_drop: Annotated[
        float | None,
        typer.Option(
            help="Relative drop, of nll nats per token, that no job can loosen. [default: 0.03, nll 0.05]"
        ),
    ] = None,
    data_dir: DataDir = None,
) -> None:
    """Make every later job of a project watch a benchmark: no job can switch it off."""
    settings = settings_for(data_dir)
    with (
        open_database(settings, command="retain benchmarks require") as factory,
        transaction(factory) as session,
    ):
        project_id = ensure_project(session, project)
        required = require_benchmark(session, project_id, name, weight=weight, limit=max_drop)
        sign(session, required.benchmark.reference, project_id=project_id)
        reference, limit = required.benchmark.reference, required.limit
    tell(f"Every job of '{project}' is watched by {reference} from now on; limit {limit:g}.")
    show(reference)


@benchmarks.command()
def release(
    name: Annotated[str, typer.Argument(help="What the project no longer requires.")],
    project: Project = DEFAULT_PROJECT,
    data_dir: DataDir = None,
) -> None:
    """Take a benchmark out of what a project requires."""
    settings = settings_for(data_dir)
    with (
        open_database(settings, command="retain benchmarks release") as factory,
        transaction(factory) as session,
    ):
        project_id = ensure_project(session, project)
        release_benchmark(session, project_id, name)
        sign(session, name, project_id=project_id)
    tell("Released.")


@benchmarks.command()
def required(project: Project = DEFAULT_PROJECT, data_dir: DataDir = None) -> None:
    """List what a project requires."""
    with open_database(settings_for(data_dir)) as factory, transaction(factory) as session:
        rows = [
            (each.benchmark.reference, each.weight, each.limit)
            for each in list_required(session, ensure_project(session, project))
        ]
    show_table(("NAME", "WEIGHT", "LIMIT"), rows)
