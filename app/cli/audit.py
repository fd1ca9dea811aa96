"""`retain audit`: who changed what, from the data directory's database."""

import json
import sys
from datetime import UTC, datetime
from typing import Annotated

import typer

from app.cli.operator import DataDir, open_database, settings_for
from app.cli.output import tell
from app.db.repositories.audit import AuditFilter
from app.errors import BadRequest
from app.services.audit import export_entries

audit = typer.Typer(help="The audit log (operator).", no_args_is_help=True)


@audit.callback()
def _group() -> None:
    """Keeps the command's own name, which a group of one command would drop."""


@audit.command()
def export(
    since: Annotated[
        str | None,
        typer.Option(help="A date or time as 2026-01-31 or 2026-01-31T12:00Z; UTC unless it says."),
    ] = None,
    actor: Annotated[str | None, typer.Option(help="A key's id, or operator:USER.")] = None,
    object_id: Annotated[str | None, typer.Option(help="What was made or changed.")] = None,
    data_dir: DataDir = None,
) -> None:
    """Print every project's entries and the operator's as JSON lines, oldest first."""
    wanted = AuditFilter(actor, object_id, None if since is None else parse_moment(since))
    count = 0
    with open_database(settings_for(data_dir)) as factory:
        for entry in export_entries(factory, wanted):
            sys.stdout.write(json.dumps(entry, ensure_ascii=False) + "\n")
            count += 1
    tell(f"{count:,} entries.")


def parse_moment(text: str) -> datetime:
    """A moment in ISO 8601; without a zone it is UTC.

    Raises:
        BadRequest: It is none.
    """
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise BadRequest(f"--since {text}: write 2026-01-31 or 2026-01-31T12:00Z.") from None
    return moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)
