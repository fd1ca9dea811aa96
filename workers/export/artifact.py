"""The directory that is published: a peft adapter or full weights, tokenizer, template, and where it came from."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, Literal

from torch import nn

from app.domain.digests import file_sha256, list_files
from app.errors import TrainingFailed
from workers.export.adapter_files import write_adapter
from workers.export.bottleneck import BottleneckModel, save_bottlenecks
from workers.export.merge import active_adapters, changes_something, merged_weights

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

    An adapter at a point below 1 has its `lora_B` scaled, so the plain peft layout loads anywhere. Where there
    are several, each that changes something lies in a directory of its own, called as it is, and the last
    active one at the root, so that the whole loads as one adapter. The directory appears whole or not at all.

    Args:
        directory: Replaced where it is there.
        model: A peft or bottleneck model for `adapter`; a transformers model for `full`, or a peft model, whose
            active adapters are then merged into the weights that are written.
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
    base_model = provenance.get("base_model")
    if kind == "full":
        _save_full(partial, model)
    elif isinstance(model, BottleneckModel):
        save_bottlenecks(partial, model, base_model=base_model)
    else:
        _save_adapters(partial, model, base_model)
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


def _save_full(directory: Path, model: Any) -> None:  # noqa: ANN401
    if hasattr(model, "peft_config"):
        model.get_base_model().save_pretrained(directory, state_dict=merged_weights(model))
    else:
        model.save_pretrained(directory)


def _save_adapters(directory: Path, model: Any, base_model: str | None) -> None:  # noqa: ANN401
    root = active_adapters(model)[-1]
    if len(model.peft_config) > 1:
        for name in model.peft_config:
            if name == root or changes_something(model, name):
                write_adapter(directory / name, model, name, base_model)
    write_adapter(directory, model, root, base_model)


def _save_tokenizer(directory: Path, tokenizer: Any, chat_template: str | None) -> None:  # noqa: ANN401
    own = tokenizer.chat_template
    try:
        if chat_template is not None:
            tokenizer.chat_template = chat_template
        tokenizer.save_pretrained(directory)
    finally:
        tokenizer.chat_template = own
