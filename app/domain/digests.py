"""SHA-256 of files, and of directories as the sorted list of their files."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

CHUNK_BYTES = 2**20


def file_sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def list_files(root: Path) -> dict[str, Path]:
    """Every file below a directory by its name relative to it, `/` between parts, sorted."""
    files = {path.relative_to(root).as_posix(): path for path in root.rglob("*") if path.is_file()}
    return dict(sorted(files.items()))


def tree_sha256(digests: Mapping[str, str]) -> str:
    """One digest for a directory: over the sorted pairs of file name and file digest.

    Args:
        digests: Hex digest of each file by its relative name.
    """
    total = hashlib.sha256()
    for name, digest in sorted(digests.items()):
        total.update(f"{name}\0{digest}\n".encode())
    return total.hexdigest()


def directory_sha256(root: Path) -> str:
    """Hex digest of a directory's contents, names included."""
    return tree_sha256({name: file_sha256(path) for name, path in list_files(root).items()})
