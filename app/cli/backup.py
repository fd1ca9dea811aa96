"""`retain backup` and `retain restore`: database and artifacts of the data directory, as one."""

import os
from typing import Annotated

import typer

from app.cli.operator import DataDir, open_database, settings_for
from app.cli.output import tell
from app.db.session import build_engine, build_session_factory, transaction
from app.embedded import operator_database
from app.embedded.backup import back_up
from app.embedded.backup_manifest import Manifest
from app.embedded.restore import restore as bring_back
from app.services.audit import following, operator_trail, sign


def backup(
    target: Annotated[str, typer.Argument(help="An empty directory, or URL of an object store.")],
    reference: Annotated[
        bool,
        typer.Option(
            "--reference",
            help="Only list artifacts with their digests: the store keeps them, and versions them itself.",
        ),
    ] = False,
    include_secret_key: Annotated[
        bool,
        typer.Option(
            "--include-secret-key",
            help="Bring the key of webhook secrets along. Keep such a backup as safe as the key.",
        ),
    ] = False,
    data_dir: DataDir = None,
) -> None:
    """Back up database and artifacts, as of one moment; the server may run on."""
    settings = settings_for(data_dir)
    os.umask(0o077)  # a dump holds everything
    with open_database(settings, command="retain backup") as factory:
        with transaction(factory) as session:
            sign(session)
            engine = session.get_bind().engine
        url = engine.url.render_as_string(hide_password=False)
        done = back_up(
            url,
            settings,
            target,
            copies=not reference,
            with_secret_key=include_secret_key,
        )
    tell(f"Backed up {_describe(done)} to {target}.")
    if not include_secret_key:
        tell(
            "The key of webhook secrets is not in it: keep DATA_DIR/secret.key or RETAIN_SECRET_KEY."
        )


def restore(
    source: Annotated[str, typer.Argument(help="Where the backup lies.")],
    data_dir: DataDir = None,
) -> None:
    """Bring a backup into an empty data directory, checking every digest."""
    settings = settings_for(data_dir)
    with operator_database(settings) as database_url:
        done = bring_back(database_url, settings, source)
        engine = build_engine(database_url, application="retain-cli")
        try:
            with (
                following(operator_trail("retain restore")),
                transaction(build_session_factory(engine)) as session,
            ):
                sign(session)
        finally:
            engine.dispose()
    tell(f"Restored {_describe(done)}, as of {done.created_at:%Y-%m-%d %H:%M} UTC.")
    tell("Jobs that ran then are queued again once their leases have run out.")


def _describe(manifest: Manifest) -> str:
    size = sum(artifact.size_bytes for artifact in manifest.artifacts)
    return f"the database and {len(manifest.artifacts):,} artifacts ({size / 1e6:,.1f} MB)"
