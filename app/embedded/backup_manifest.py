"""What a backup holds: its manifest, and its artifacts on their way through local disk."""

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Final, Literal

import psycopg
from pydantic import BaseModel, ConfigDict, ValidationError

from app.domain.digests import file_sha256, list_files, tree_sha256
from app.errors import BadRequest, NotFound
from app.services.storage import Storage
from app.settings import Settings

MANIFEST: Final = "backup.json"  # written last: without it there is no backup
DATABASE: Final = "database.dump"
KEY_FILE: Final = "secret.key"
ARTIFACTS: Final = "artifacts"
CHECKPOINT_MANIFEST: Final = "manifest.json"
Kind = Literal["file", "directory", "checkpoint"]


class BackupDamaged(BadRequest):
    """What lies there is no whole backup."""

    code = "backup_damaged"


class Frozen(BaseModel):
    """A part of the manifest."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Artifact(Frozen):
    """Something in the store, and what each of its files has to hash to."""

    path: str
    kind: Kind
    files: dict[str, str]  # SHA-256 by name within it; of a file under ""
    size_bytes: int


class Manifest(Frozen):
    """What a backup holds."""

    version: Literal[1] = 1
    created_at: datetime
    revision: str  # of the schema
    postgres: int  # major version of the server
    database_sha256: str
    secret_sha256: str | None  # of the key of secrets, where it was asked for
    holds_artifacts: bool  # False: they stay in the store that they were in
    artifacts: tuple[Artifact, ...]


class Sealed(Frozen):
    """The manifest as it lies there."""

    manifest: Manifest
    sha256: str


def digest_manifest(manifest: Manifest) -> str:
    """What a manifest is sealed with."""
    return hashlib.sha256(manifest.model_dump_json().encode()).hexdigest()


def read_manifest(source: Storage) -> Manifest:
    """The manifest of a backup that was finished.

    Raises:
        BackupDamaged: There is none, or it was torn or changed.
    """
    try:
        sealed = Sealed.model_validate_json(source.read_bytes(MANIFEST))
    except NotFound:
        raise BackupDamaged(
            f"There is no {MANIFEST}: this is no backup, or one that was broken off."
        ) from None
    except ValidationError:
        raise BackupDamaged(f"{MANIFEST} is damaged or of a newer release.") from None
    if digest_manifest(sealed.manifest) != sealed.sha256:
        raise BackupDamaged(f"{MANIFEST} was changed: its digest differs.")
    return sealed.manifest


def digest_artifact(kind: Kind, files: Mapping[str, str], local: Path) -> str | None:
    """What its row holds the digest of; None for a checkpoint that lacks something.

    Args:
        kind: What it is.
        files: SHA-256 of each file by name.
        local: Where it lies.
    """
    if kind == "file":
        return files.get("")
    if kind == "directory":
        return tree_sha256(files)
    sealed = files.get(CHECKPOINT_MANIFEST)
    if sealed is not None:
        try:
            listed = json.loads((local / CHECKPOINT_MANIFEST).read_bytes())["files"]
            is_whole = all(files.get(name) == facts["sha256"] for name, facts in listed.items())
        except (ValueError, KeyError, TypeError, AttributeError):
            return None
        return sealed if is_whole else None
    return None


@contextmanager
def fetched(place: Storage, path: str, kind: Kind, local: Path) -> Iterator[dict[str, str] | None]:
    """Brings an artifact to a local path for the length of a block.

    Yields:
        The digest of each of its files; None if it is not there.
    """
    files: dict[str, str] | None
    try:
        place.get_file(path, local) if kind == "file" else place.get_directory(path, local)
        files = {name: file_sha256(file) for name, file in parts_of(local).items()}
    except (NotFound, FileNotFoundError):  # as a whole, or while it was being copied
        files = None
    try:
        yield files
    finally:
        if local.is_dir():
            shutil.rmtree(local)
        else:
            local.unlink(missing_ok=True)


def parts_of(local: Path) -> dict[str, Path]:
    """The files of an artifact by name within it; a file's own name is empty."""
    return list_files(local) if local.is_dir() else {"": local}


def put_artifact(place: Storage, local: Path, path: str, kind: Kind) -> None:
    """Stores what lies at a local path."""
    if kind == "file":
        place.put_file(local, path)
    else:
        place.put_directory(local, path)


def major_of(connection: psycopg.Connection) -> int:
    """The server's major version."""
    return connection.info.server_version // 10_000


def scratch_of(settings: Settings) -> Path:
    """The local disk for what is on its way, which is made."""
    settings.scratch_root.mkdir(parents=True, exist_ok=True)
    return settings.scratch_root
