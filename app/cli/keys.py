"""`retain keys`: API keys, made and revoked on the data directory's database."""

from datetime import UTC, datetime, timedelta
from typing import Annotated

import typer
from sqlalchemy.orm import Session

from app.cli.operator import DataDir, open_database, settings_for
from app.cli.output import show, show_table, tell
from app.db.models import ApiKey
from app.db.session import transaction
from app.domain.identifiers import public_id
from app.domain.scopes import DEFAULT_SCOPES, Scope, parse_scopes
from app.services.audit import sign
from app.services.keys import (
    DEFAULT_PROJECT,
    create_key,
    ensure_project,
    find_key,
    list_keys,
    replace_key,
    revoke_key,
)

keys = typer.Typer(help="API keys (operator).", no_args_is_help=True)


@keys.command()
def create(
    name: Annotated[str, typer.Argument(help="What the key is for.")],
    project: Annotated[str, typer.Option(help="Its project; made when missing.")] = DEFAULT_PROJECT,
    scope: Annotated[
        list[str] | None,
        typer.Option(
            help=f"Repeatable: {', '.join(Scope)}. [default: all but {Scope.KEYS_ADMIN}]",
            show_default=False,
        ),
    ] = None,
    expires_days: Annotated[
        float | None, typer.Option(min=0.001, help="Days until it expires. [default: never]")
    ] = None,
    data_dir: DataDir = None,
) -> None:
    """Make a key and print it: this once, as only its digest is kept."""
    scopes = parse_scopes(scope) if scope else DEFAULT_SCOPES
    expires_at = None if expires_days is None else datetime.now(UTC) + timedelta(days=expires_days)
    settings = settings_for(data_dir)
    with (
        open_database(settings, command="retain keys create") as factory,
        transaction(factory) as session,
    ):
        created = create_key(
            session,
            project_id=ensure_project(session, project),
            name=name,
            scopes=scopes,
            expires_at=expires_at,
        )
        _sign(session, created.row)
    tell(f"Key '{name}' of project '{project}'; it is shown this once. Use it as RETAIN_API_KEY.")
    show(created.text)


@keys.command("list")
def list_(
    project: Annotated[str | None, typer.Option(help="Only of this project.")] = None,
    data_dir: DataDir = None,
) -> None:
    """List keys: never their secrets."""
    with open_database(settings_for(data_dir)) as factory, transaction(factory) as session:
        rows = list_keys(session, project=project)
    show_table(
        ("ID", "NAME", "PROJECT", "STATE", "LAST USED", "SCOPES"),
        [
            (
                key.key_id,
                key.name,
                project_name,
                _state(key.revoked_at, key.expires_at),
                _time(key.last_used_at),
                "default" if set(key.scopes) == set(DEFAULT_SCOPES) else " ".join(key.scopes),
            )
            for key, project_name in rows
        ],
    )


@keys.command()
def rotate(
    key_id: Annotated[str, typer.Argument(help="The key's id (8 characters), or the whole key.")],
    overlap_hours: Annotated[
        float, typer.Option(min=0, help="For so long the old key still works.")
    ] = 24.0,
    data_dir: DataDir = None,
) -> None:
    """Replace a key: a new one with its name, scopes and end; print it, this once."""
    settings = settings_for(data_dir)
    with (
        open_database(settings, command="retain keys rotate") as factory,
        transaction(factory) as session,
    ):
        old = find_key(session, key_id)
        created = replace_key(session, old, overlap_hours * 3600)
        _sign(session, old, created.row)
    tell(
        f"Key '{created.row.name}'; it is shown this once. The old one ends in {overlap_hours:g} h."
    )
    show(created.text)


@keys.command()
def revoke(
    key_id: Annotated[str, typer.Argument(help="The key's id (8 characters), or the whole key.")],
    data_dir: DataDir = None,
) -> None:
    """Revoke a key; within seconds it works nowhere."""
    settings = settings_for(data_dir)
    with (
        open_database(settings, command="retain keys revoke") as factory,
        transaction(factory) as session,
    ):
        row = find_key(session, key_id)
        revoke_key(session, key_id)
        _sign(session, row)
    tell("Revoked.")


def _sign(session: Session, *rows: ApiKey) -> None:
    sign(
        session,
        *(public_id("api_key", row.id) for row in rows),
        project_id=rows[0].project_id,
    )


def _state(revoked_at: datetime | None, expires_at: datetime | None) -> str:
    if revoked_at is not None:
        return "revoked"
    if expires_at is not None and expires_at < datetime.now(UTC):
        return "expired"
    return "live"


def _time(moment: datetime | None) -> str | None:
    return None if moment is None else moment.astimezone().strftime("%Y-%m-%d %H:%M")
