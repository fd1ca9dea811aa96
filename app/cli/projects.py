"""`retain projects`: projects and their quotas, on the data directory's database."""

from typing import Annotated

import typer

from app.cli.operator import DataDir, open_database, settings_for
from app.cli.output import show_table, tell
from app.db.session import transaction
from app.errors import BadRequest
from app.services.audit import sign
from app.services.projects import list_projects, set_quotas
from app.services.quotas import show_usage, standard_quotas

projects = typer.Typer(help="Projects and their quotas (operator).", no_args_is_help=True)

DEFAULT = "default"
Quota = Annotated[str | None, typer.Option(help="A number, or `default`: the server's own.")]


@projects.command("list")
def list_(data_dir: DataDir = None) -> None:
    """List projects with what they use of their quotas."""
    settings = settings_for(data_dir)
    standard = standard_quotas(settings)
    with open_database(settings) as factory, transaction(factory) as session:
        rows = [(row, show_usage(session, row.id, standard)) for row in list_projects(session)]
    show_table(
        ("PROJECT", "QUEUED", "RUNNING", "STORED BYTES"),
        [
            (
                row.name,
                _of(usage.queued_jobs, usage.quotas.queued_jobs),
                _of(usage.running_jobs, usage.quotas.running_jobs),
                _of(usage.storage_bytes, usage.quotas.storage_bytes),
            )
            for row, usage in rows
        ],
    )


@projects.command("set")
def set_(
    name: Annotated[str, typer.Argument(help="The project; made when missing.")],
    max_queued_jobs: Quota = None,
    max_running_jobs: Quota = None,
    max_storage_bytes: Quota = None,
    data_dir: DataDir = None,
) -> None:
    """Give a project quotas of its own; what is not named stays."""
    given = {
        "max_queued_jobs": max_queued_jobs,
        "max_running_jobs": max_running_jobs,
        "max_storage_bytes": max_storage_bytes,
    }
    quotas = {quota: _number(quota, text) for quota, text in given.items() if text is not None}
    if not quotas:
        raise BadRequest(
            "Name a quota: --max-queued-jobs, --max-running-jobs, --max-storage-bytes."
        )
    settings = settings_for(data_dir)
    with (
        open_database(settings, command="retain projects set") as factory,
        transaction(factory) as session,
    ):
        set_quotas(session, name, quotas)
        sign(session, name)
    said = ", ".join(f"{quota} {text}" for quota, text in given.items() if text is not None)
    tell(f"Project '{name}': {said}.")


def _number(quota: str, text: str) -> int | None:
    if text == DEFAULT:
        return None
    if not (text.isascii() and text.isdigit()):
        raise BadRequest(f"{quota}: give a number from 1, or `default`.", quota)
    return int(text)


def _of(used: int, limit: int | None) -> str:
    return f"{used:,}" if limit is None else f"{used:,} of {limit:,}"
