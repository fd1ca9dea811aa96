"""Backups: a dump of one snapshot, with every artifact that its rows name."""

import time
from collections.abc import Collection
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

import psycopg

from app.embedded.backup_manifest import (
    ARTIFACTS,
    DATABASE,
    KEY_FILE,
    MANIFEST,
    Artifact,
    Kind,
    Manifest,
    Sealed,
    digest_artifact,
    digest_manifest,
    fetched,
    major_of,
    parts_of,
    put_artifact,
    scratch_of,
)
from app.embedded.dumps import DUMP, find_program, plain_url, run_program
from app.errors import Conflict
from app.services.storage import Storage, StorageDamaged
from app.settings import Settings

SNAPSHOTS: Final = 5  # tries; one is taken anew when an artifact was deleted after it
GONE_SECONDS: Final = 3.0
Row = tuple[str, Kind, str]

#: Path, kind and digest of everything in the store that a row names; of a directory as `tree_sha256`, of a
#: checkpoint as its manifest's.
REFERENCED: Final = """
SELECT path, 'file' AS kind, sha256 FROM files WHERE deleted_at IS NULL
UNION SELECT p.path, 'file', p.sha256 FROM upload_parts p JOIN uploads u ON u.id = p.upload_id
      WHERE u.cleared_at IS NULL
UNION SELECT path, 'directory', sha256 FROM base_models
UNION SELECT path, 'directory', sha256 FROM model_versions
      WHERE deleted_at IS NULL AND path IS NOT NULL AND sha256 IS NOT NULL
UNION SELECT path, 'checkpoint', manifest_sha256 FROM checkpoints
      WHERE deleted_at IS NULL AND NOT corrupt
ORDER BY 1
"""


def back_up(
    database_url: str,
    settings: Settings,
    target_url: str,
    *,
    copies: bool = True,
    with_secret_key: bool = False,
) -> Manifest:
    """Writes a backup to a directory or URL that is empty.

    Args:
        database_url: Of the database, which may be in use.
        settings: Name the store.
        target_url: Where it goes.
        copies: Whether artifacts are copied, or only listed with their digests.
        with_secret_key: Whether the data directory's key of secrets comes with it.

    Raises:
        Conflict: Something lies there.
        StorageDamaged: An artifact is missing, or not what was stored.
        DumpFailed: Postgres' program is missing, too old, or failed.
    """
    target, store = Storage(target_url), Storage(settings.storage_root)
    if not target.is_empty():
        raise Conflict(f"{target_url} is not empty; name a new place for each backup.", "target")
    kept: dict[str, Artifact] = {}
    with TemporaryDirectory(prefix="backup-", dir=scratch_of(settings)) as scratch:
        tries = 0
        while True:
            tries += 1
            revision, major, rows = _dump(database_url, settings, Path(scratch) / DATABASE)
            problems = _keep(rows, store, target if copies else None, kept, Path(scratch))
            if not problems:
                break
            if tries == SNAPSHOTS or not _are_gone(database_url, problems):
                path, problem = next(iter(problems.items()))
                raise StorageDamaged(f"A row names {path} in the store: {problem}.")
        database = target.put_file(Path(scratch) / DATABASE, DATABASE)
    secret = None
    if with_secret_key:
        secret = target.put_bytes((settings.data_dir / KEY_FILE).read_bytes(), KEY_FILE).sha256
    manifest = Manifest(
        created_at=datetime.now(UTC),
        revision=revision,
        postgres=major,
        database_sha256=database.sha256,
        secret_sha256=secret,
        holds_artifacts=copies,
        artifacts=tuple(kept[path] for path, _, _ in rows),
    )
    sealed = Sealed(manifest=manifest, sha256=digest_manifest(manifest))
    target.put_bytes(sealed.model_dump_json(indent=1).encode(), MANIFEST)
    return manifest


def _dump(database_url: str, settings: Settings, local: Path) -> tuple[str, int, list[Row]]:
    """Dumps one snapshot; its schema's revision, the server's version, and the artifacts that its rows name."""
    with psycopg.connect(plain_url(database_url)) as connection:
        connection.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        connection.read_only = True
        [snapshot] = connection.execute("SELECT pg_export_snapshot()").fetchone() or ("",)
        [revision] = connection.execute("SELECT version_num FROM alembic_version").fetchone() or (
            "",
        )
        rows = [(row[0], row[1], row[2]) for row in connection.execute(REFERENCED)]
        major = major_of(connection)
        program = find_program(DUMP, server_major=major, given=settings.pg_dump)
        run_program(
            program,
            database_url,
            *("--format=custom", "--no-owner", "--no-privileges"),
            *(f"--snapshot={snapshot}", "--file", str(local)),
        )
    return revision, major, rows


def _keep(
    rows: list[Row],
    store: Storage,
    target: Storage | None,
    kept: dict[str, Artifact],
    scratch: Path,
) -> dict[str, str]:
    """Copies what is not yet kept, checking each digest; what is wrong with others, by path."""
    problems = {}
    local = scratch / "artifact"
    for path, kind, sha256 in rows:
        if path in kept:
            continue
        with fetched(store, path, kind, local) as files:
            if files is None:
                problems[path] = "it is not there"
                continue
            if digest_artifact(kind, files, local) != sha256:
                problems[path] = "it does not match its row's digest"
                continue
            if target is not None:
                put_artifact(target, local, f"{ARTIFACTS}/{path}", kind)
            size = sum(file.stat().st_size for file in parts_of(local).values())
            kept[path] = Artifact(path=path, kind=kind, files=files, size_bytes=size)
    return problems


def _are_gone(database_url: str, paths: Collection[str]) -> bool:
    """Whether no row names these any more; a deletion that is under way is waited for."""
    deadline = time.monotonic() + GONE_SECONDS
    while True:
        with psycopg.connect(plain_url(database_url)) as connection:
            named = {row[0] for row in connection.execute(REFERENCED)}
        if not named & set(paths):
            return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
