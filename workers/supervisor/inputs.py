"""Bringing a run's inputs to local disk, verified."""

import json
import os
import shutil
from pathlib import Path

from app.domain.digests import file_sha256
from app.errors import Unavailable
from app.services.scratch import Input, SavedState
from app.services.storage import Storage

MANIFEST = "manifest.json"


class CheckpointDamaged(Unavailable):
    """A checkpoint's files are not what its row and its manifest say."""

    code = "checkpoint_damaged"


def fetch_input(storage: Storage, item: Input) -> None:
    """Brings one input; what is there already has been verified when it came.

    Raises:
        NotFound: It is not in the store.
        StorageDamaged: Its digest differs.
    """
    if not item.local.exists():
        try:
            bring = storage.get_directory if item.is_directory else storage.get_file
            bring(item.path, item.local, sha256=item.sha256)
        except OSError:
            if not item.local.exists():  # else another worker brought it meanwhile
                raise
    os.utime(item.local)  # what is in use is not cleared away


def fetch_state(storage: Storage, state: SavedState) -> None:
    """Brings a checkpoint and compares every file with the manifest, and the manifest with the row.

    Raises:
        NotFound: It is not in the store.
        CheckpointDamaged: Something is missing, torn or changed; nothing is left of it here.
    """
    if not state.local.exists():
        storage.get_directory(state.path, state.local)
    problem = find_damage(state.local, state.manifest_sha256)
    if problem is not None:
        shutil.rmtree(state.local, ignore_errors=True)
        raise CheckpointDamaged(f"The checkpoint at {state.path} is damaged: {problem}.")


def find_damage(directory: Path, manifest_sha256: str) -> str | None:
    """What is wrong with a checkpoint directory; None when all is as it was saved."""
    manifest = directory / MANIFEST
    if not manifest.is_file():
        return "the manifest is missing"
    if file_sha256(manifest) != manifest_sha256:
        return "the manifest was changed"
    for name, facts in json.loads(manifest.read_text())["files"].items():
        path = directory / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != facts["size"]:
            return f"{name} has {path.stat().st_size} of {facts['size']} bytes"
        if file_sha256(path) != facts["sha256"]:
            return f"{name} was changed"
    return None
