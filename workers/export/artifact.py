"""The directory that is published: a peft adapter or full weights, tokenizer, template, and where it came from."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, Literal

from torch import nn

from app.domain.digests import file_sha256, list_files
from app.errors import TrainingFailed

PROVENANCE_FILE: Final = "retain.json"
ArtifactKind = Literal["adapter", "full"]
_ALLOWED: Final = (
    ".json",
    ".safetensors",
    ".jinja",
    ".txt",
    ".model",
    ".png",
)  # nothing that is unpickled or run


def save_artifact(
    directory: Path,
    model: nn.Module,
    tokenizer: Any,  # noqa: ANN401 - transformers is untyped
    *,
    kind: ArtifactKind,
    provenance: Mapping[str, Any],
    chat_template: str | None = None,
    extras: Callable[[Path], None] | None = None,
) -> Path:
    """Writes the weights as they stand, so set the point of the line before.

    An adapter at a point below 1 has its `lora_B` scaled, so the plain peft layout loads anywhere. The
    directory appears whole or not at all.

    Args:
        directory: Replaced where it is there.
        model: A peft model for `adapter`, a transformers model for `full`.
        tokenizer: Saved beside the weights.
        kind: What is written.
        provenance: JSON values for `retain.json`: `job`, `base_model`, `base_sha256`, `template`, and `alpha`,
            the point of the line.
        chat_template: In force where the tokenizer has none; written with it.
        extras: Writes what is published beside the weights, as safetensors, JSON or PNG.

    Returns:
        The directory.

    Raises:
        TrainingFailed: The library wrote something else than safetensors and JSON; code `export_failed`.
    """
    partial = directory.with_name(f".{directory.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    if kind == "adapter":
        _save_adapter(partial, model, provenance)
    else:
        saved: Any = model
        saved.save_pretrained(partial)
    _save_tokenizer(partial, tokenizer, chat_template)
    if extras is not None:
        extras(partial)
    files = {name: file_sha256(path) for name, path in list_files(partial).items()}
    foreign = [name for name in files if not name.endswith(_ALLOWED)]
    if foreign:
        raise TrainingFailed(
            f"artifact: unexpected files {', '.join(foreign)}", None, "export_failed"
        )
    record = {"format": 1, "kind": kind, **provenance, "files": files}
    (partial / PROVENANCE_FILE).write_text(json.dumps(record, indent=2, sort_keys=True) + "\n")
    shutil.rmtree(directory, ignore_errors=True)
    partial.rename(directory)
    return directory


def load_provenance(directory: Path) -> dict[str, Any]:
    """The record of an artifact, after its files were checked against it.

    Raises:
        TrainingFailed: A file is missing, added or changed; code `damaged_artifact`.
    """
    record: dict[str, Any] = json.loads((directory / PROVENANCE_FILE).read_text())
    found = {name: file_sha256(path) for name, path in list_files(directory).items()}
    found.pop(PROVENANCE_FILE)
    if found != record["files"]:
        changed = sorted(
            name
            for name in found.keys() | record["files"].keys()
            if found.get(name) != record["files"].get(name)
        )
        raise TrainingFailed(
            f"artifact: {', '.join(changed)} not as recorded", None, "damaged_artifact"
        )
    return record


def _save_adapter(directory: Path, model: Any, provenance: Mapping[str, Any]) -> None:  # noqa: ANN401
    """The peft layout, without the model card, and naming the base model instead of its path here."""
    model.save_pretrained(directory, save_embedding_layers=False)
    (directory / "README.md").unlink(missing_ok=True)
    path = directory / "adapter_config.json"
    config = json.loads(path.read_text())
    config["base_model_name_or_path"] = provenance.get("base_model")
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _save_tokenizer(directory: Path, tokenizer: Any, chat_template: str | None) -> None:  # noqa: ANN401
    own = tokenizer.chat_template
    try:
        if chat_template is not None:
            tokenizer.chat_template = chat_template
        tokenizer.save_pretrained(directory)
    finally:
        tokenizer.chat_template = own
