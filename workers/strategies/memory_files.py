"""The memory on disk: keys as safetensors beside a manifest, replaced as one."""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from workers.strategies.reservoir import FORMAT, Entry, MemoryStore

MANIFEST = "memory.json"


def save_memory(
    store: MemoryStore, directory: Path, *, describe: Callable[[Entry], Mapping[str, Any]] = asdict
) -> None:
    """Writes keys (safetensors) and manifest (JSON); a reader sees the old pair or the new, never a mix.

    The keys' file is named by its content, and the manifest, replaced last, names it.

    Args:
        store: What to write.
        directory: Created where missing.
        describe: What the manifest says of an entry; a store is loaded from full descriptions alone.
    """
    directory.mkdir(parents=True, exist_ok=True)
    tensors, scalars = store.state()
    partial = directory / f".memory.{os.getpid()}.partial"
    save_file({name: t.contiguous() for name, t in tensors.items()}, partial)
    digest = _sha256(partial)
    keys = directory / f"memory-{digest[:16]}.safetensors"
    partial.replace(keys)
    scalars["entries"] = [dict(describe(entry)) for entry in store.entries]
    manifest = {"keys": keys.name, "sha256": digest, **scalars}
    partial.write_text(json.dumps(manifest, sort_keys=True))
    partial.replace(directory / MANIFEST)
    for old in directory.glob("memory-*.safetensors"):
        if old != keys:
            old.unlink()


def load_memory(directory: Path, *, encoder: str) -> MemoryStore:
    """A store as it was saved.

    Raises:
        EncoderChanged: Another encoder made its keys.
        ValueError: A file is damaged, or of another format.
    """
    manifest = json.loads((directory / MANIFEST).read_text())
    if manifest["format"] != FORMAT:
        raise ValueError(f"the memory's format is {manifest['format']}, not {FORMAT}")
    keys = directory / Path(manifest["keys"]).name
    if _sha256(keys) != manifest["sha256"]:
        raise ValueError(f"{keys.name} is not what was saved")
    store = MemoryStore(
        capacity=manifest["capacity"],
        dim=manifest["dim"],
        encoder=encoder,
        seed=0,
        policy=manifest["policy"],
        dup_threshold=manifest["dup_threshold"],
    )
    store.load_state(load_file(keys), manifest)
    return store


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
