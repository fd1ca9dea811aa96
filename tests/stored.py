"""Rows whose files really lie in a store, for tests that run jobs."""

from pathlib import Path
from typing import Any
from uuid import uuid4

from sqlalchemy.orm import Session

from app.db.models import BaseModel, BenchmarkVersion, File, Project
from app.services.storage import Storage
from tests.factories import make_base_model, make_benchmark, make_file


def store_base_model(
    session: Session, storage: Storage, directory: Path, **overrides: Any
) -> BaseModel:
    """A base model of a local directory."""
    stored = storage.put_directory(directory, f"models/base/{uuid4().hex}")
    fields = {"path": stored.path, "sha256": stored.sha256, "size_bytes": stored.size_bytes}
    return make_base_model(session, **fields | overrides)


def store_file(
    session: Session,
    storage: Storage,
    project: Project | None,
    text: str,
    directory: Path,
    **overrides: Any,
) -> File:
    """A file with this text."""
    directory.mkdir(parents=True, exist_ok=True)
    local = directory / uuid4().hex
    local.write_text(text)
    stored = storage.put_file(local, f"files/{uuid4().hex}")
    fields = {
        "path": stored.path,
        "sha256": stored.sha256,
        "size_bytes": stored.size_bytes,
        "report": {"format": "chat", "num_rows": len(text.splitlines())},
    }
    return make_file(session, project, **fields | overrides)


def store_benchmark(
    session: Session, file: File, num_items: int, **overrides: Any
) -> BenchmarkVersion:
    """A benchmark version of a stored file of items."""
    fields: dict[str, Any] = {
        "file_id": file.id,
        "items_sha256": file.sha256,
        "num_items": num_items,
    }
    return make_benchmark(session, **fields | overrides)
