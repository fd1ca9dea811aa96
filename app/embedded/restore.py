"""The way back from a backup: into a database and a store that are empty."""

from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

import psycopg
from psycopg.conninfo import conninfo_to_dict

from app.embedded.backup_manifest import (
    ARTIFACTS,
    DATABASE,
    KEY_FILE,
    BackupDamaged,
    Manifest,
    fetched,
    major_of,
    put_artifact,
    read_manifest,
    scratch_of,
)
from app.embedded.dumps import RESTORE, find_program, plain_url, run_program
from app.embedded.schema import known_revisions, upgrade
from app.errors import Conflict, NotFound
from app.services.storage import Storage, StorageDamaged
from app.settings import Settings


def restore(database_url: str, settings: Settings, source_url: str) -> Manifest:
    """Brings a backup into a database and a store that are empty, and the schema to the newest.

    Leases that workers held run out by themselves: their jobs are queued again and go on from their checkpoints.

    Raises:
        BackupDamaged: It is no whole backup; nothing stays then.
        Conflict: The database or the store is not empty.
        DumpFailed: Postgres' program is missing, too old, or failed.
    """
    source, store = Storage(source_url), Storage(settings.storage_root)
    manifest = read_manifest(source)
    if manifest.revision not in known_revisions():
        raise BackupDamaged(f"The backup has schema {manifest.revision}, newer than this release.")
    secret = settings.data_dir / KEY_FILE
    with psycopg.connect(plain_url(database_url)) as connection:
        _require_empty(connection, store, secret, manifest)
        program = find_program(RESTORE, server_major=major_of(connection), given=settings.pg_dump)
    with ExitStack() as undo, TemporaryDirectory(dir=scratch_of(settings)) as scratch:
        dump = Path(scratch) / DATABASE
        _fetch(source, DATABASE, dump, manifest.database_sha256)
        _bring_artifacts(source, store, manifest, Path(scratch) / "artifact", undo)
        if manifest.secret_sha256 is not None:
            key = Path(scratch) / KEY_FILE
            _fetch(source, KEY_FILE, key, manifest.secret_sha256)
            secret.touch(mode=0o600, exist_ok=False)
            undo.callback(secret.unlink)
            secret.write_bytes(key.read_bytes())
        name = str(conninfo_to_dict(plain_url(database_url))["dbname"])
        run_program(
            program,
            database_url,
            *("--no-owner", "--no-privileges", "--exit-on-error", "--single-transaction"),
            *("--dbname", name, str(dump)),
        )
        undo.pop_all()
    upgrade(database_url)
    return manifest


def _require_empty(
    connection: psycopg.Connection, store: Storage, secret: Path, manifest: Manifest
) -> None:
    [tables] = connection.execute(
        "SELECT count(*) FROM pg_tables WHERE schemaname = 'public'"
    ).fetchone() or (0,)
    if tables:
        raise Conflict("The database is not empty: restore into a fresh one.", "data_dir")
    if manifest.holds_artifacts and not store.is_empty():
        raise Conflict("The store is not empty: restore into a fresh one.", "storage_url")
    if manifest.secret_sha256 is not None and secret.exists():
        raise Conflict(f"{secret} exists, and the backup brings one.", "data_dir")


def _bring_artifacts(
    source: Storage, store: Storage, manifest: Manifest, local: Path, undo: ExitStack
) -> None:
    """Puts each artifact into the store after checking it, or checks it there where the backup only names it."""
    place, prefix = (source, f"{ARTIFACTS}/") if manifest.holds_artifacts else (store, "")
    for artifact in manifest.artifacts:
        with fetched(place, prefix + artifact.path, artifact.kind, local) as files:
            if files != artifact.files:
                raise BackupDamaged(f"{artifact.path} is missing or was changed.")
            if manifest.holds_artifacts:
                undo.callback(store.delete, artifact.path)
                put_artifact(store, local, artifact.path, artifact.kind)


def _fetch(source: Storage, path: str, local: Path, sha256: str) -> None:
    try:
        source.get_file(path, local, sha256=sha256)
    except (NotFound, StorageDamaged):
        raise BackupDamaged(f"{path} is missing or was changed.") from None
