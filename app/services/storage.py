"""The one store of files, checkpoints and models: a directory or an object store, through fsspec."""

import contextlib
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple, cast
from uuid import uuid4

import fsspec
from fsspec.implementations.local import LocalFileSystem

from app.domain.digests import (
    CHUNK_BYTES,
    directory_sha256,
    file_sha256,
    list_files,
    tree_sha256,
)
from app.errors import NotFound, Unavailable


class Stored(NamedTuple):
    """What was stored: its path under the root, its bytes, and its digest."""

    path: str
    size_bytes: int
    sha256: str


class StorageDamaged(Unavailable):
    """What lies in the store is not what was put there."""

    code = "storage_damaged"


class Storage:
    """Files and directories under one root URL, named by paths relative to it.

    What is written appears whole or not at all: a local write goes to a hidden name and is renamed, an object
    store's upload is atomic by itself. A directory in an object store appears file by file, so it counts only
    once a database row names it.

    Args:
        root_url: A local directory, or any URL that fsspec knows (`s3://bucket/prefix`).
    """

    def __init__(self, root_url: str) -> None:
        self._fs, root = fsspec.core.url_to_fs(root_url)
        self._root = str(root).rstrip("/")
        self.is_local = isinstance(self._fs, LocalFileSystem)

    def put_bytes(self, data: bytes, path: str) -> Stored:
        """Stores bytes under a path, replacing what was there."""
        with self._target(path) as target:
            self._fs.pipe_file(target, data)
        return Stored(path, len(data), hashlib.sha256(data).hexdigest())

    def put_file(self, source: Path, path: str) -> Stored:
        """Stores a copy of a local file under a path, replacing what was there."""
        with self._target(path) as target:
            self._copy_in(source, target)
        return Stored(path, source.stat().st_size, file_sha256(source))

    def put_directory(self, source: Path, path: str) -> Stored:
        """Stores a copy of a local directory, links followed, under a path that is free.

        Returns:
            The digest is `tree_sha256` over its files.
        """
        files = list_files(source)
        with self._target(path) as target:
            for name, file in files.items():
                self._fs.makedirs(f"{target}/{name}".rpartition("/")[0], exist_ok=True)
                self._copy_in(file, f"{target}/{name}")
        digests = {name: file_sha256(file) for name, file in files.items()}
        size_bytes = sum(file.stat().st_size for file in files.values())
        return Stored(path, size_bytes, tree_sha256(digests))

    def get_file(self, path: str, target: Path, *, sha256: str | None = None) -> None:
        """Brings a stored file to a local path; it appears there whole or not at all.

        The copy may share its bytes with the store, so it is read only.

        Args:
            path: Under the root.
            target: Replaced when it exists.
            sha256: What the bytes have to hash to.

        Raises:
            NotFound: Nothing is stored there.
            StorageDamaged: The digest differs.
        """
        source = self._locate(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f".{target.name}.{uuid4().hex}")
        try:
            self._copy_out(source, part)
            if sha256 is not None and file_sha256(part) != sha256:
                raise StorageDamaged(f"The stored file {path} does not match its digest.")
            part.replace(target)
        finally:
            part.unlink(missing_ok=True)

    def get_directory(self, path: str, target: Path, *, sha256: str | None = None) -> None:
        """Brings a stored directory to a local path that is free; whole or not at all.

        Args:
            path: Under the root.
            target: Made here.
            sha256: What the directory has to hash to.

        Raises:
            NotFound: Nothing is stored there.
            StorageDamaged: The digest differs.
        """
        source = self._locate(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f".{target.name}.{uuid4().hex}")
        try:
            for found in self._fs.find(source):
                name = str(found).removeprefix(source).lstrip("/")
                local = part / name
                local.parent.mkdir(parents=True, exist_ok=True)
                self._copy_out(str(found), local)
            if sha256 is not None and directory_sha256(part) != sha256:
                raise StorageDamaged(f"The stored directory {path} does not match its digest.")
            part.rename(target)
        finally:
            shutil.rmtree(part, ignore_errors=True)

    def read_bytes(self, path: str) -> bytes:
        """The contents of a stored file.

        Raises:
            NotFound: Nothing is stored there.
        """
        return bytes(self._fs.cat_file(self._locate(path)))

    @contextlib.contextmanager
    def open(self, path: str) -> Iterator[BinaryIO]:
        """A stored file, opened for reading.

        Raises:
            NotFound: Nothing is stored there.
        """
        with self._fs.open(self._locate(path), "rb") as file:
            yield cast("BinaryIO", file)

    def iter_chunks(self, path: str) -> Iterator[bytes]:
        """The contents of a stored file, piece by piece.

        Raises:
            NotFound: Nothing is stored there.
        """
        with self.open(path) as file:
            while chunk := file.read(CHUNK_BYTES):
                yield chunk

    def exists(self, path: str) -> bool:
        """Whether a file or directory is stored there."""
        self._fs.invalidate_cache()  # another process may have written since the last listing
        return bool(self._fs.exists(self._full(path)))

    def is_empty(self) -> bool:
        """Whether nothing at all is stored."""
        self._fs.invalidate_cache()
        return not self._fs.exists(self._root) or not self._fs.find(self._root)

    def list_names(self, path: str) -> list[str]:
        """Names of what lies directly in a stored directory, sorted; empty when it does not exist."""
        if not self.exists(path):
            return []
        found = self._fs.ls(self._full(path), detail=False)
        names = (str(entry).rstrip("/").rpartition("/")[2] for entry in found)
        return sorted(name for name in names if not name.startswith(".tmp-"))

    def delete(self, path: str) -> None:
        """Removes a stored file or directory; does nothing when it is gone already."""
        if self.exists(path):
            self._fs.rm(self._full(path), recursive=True)

    @contextlib.contextmanager
    def _target(self, path: str) -> Iterator[str]:
        """Where to write so that the path appears at once, on leaving."""
        full = self._full(path)
        if not self.is_local:
            yield full
            return
        parent, _, _ = full.rpartition("/")
        os.makedirs(parent, exist_ok=True)  # noqa: PTH103 - fsspec speaks in strings
        part = f"{parent}/.tmp-{uuid4().hex}"
        try:
            yield part
            Path(part).replace(full)
        finally:
            if Path(part).is_dir():
                shutil.rmtree(part)
            else:
                Path(part).unlink(missing_ok=True)

    def _copy_in(self, source: Path, target: str) -> None:
        if self.is_local:
            shutil.copyfile(source, target)
            Path(target).chmod(0o444)  # fetched copies may be hard links to it
        else:
            self._fs.put_file(str(source), target)

    def _copy_out(self, source: str, target: Path) -> None:
        if self.is_local:
            try:
                target.hardlink_to(source)  # a model of many gigabytes costs nothing
            except OSError:
                shutil.copyfile(source, target)
        else:
            self._fs.get_file(source, str(target))

    def _locate(self, path: str) -> str:
        if not self.exists(path):
            raise NotFound(f"Nothing is stored at {path}.")
        return self._full(path)

    def _full(self, path: str) -> str:
        parts = PurePosixPath(path).parts
        if not parts or path.startswith("/") or ".." in parts:
            raise ValueError(f"not a path under the storage root: {path!r}")
        return f"{self._root}/{'/'.join(parts)}"
