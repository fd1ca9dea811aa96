"""Checkpoints: a directory of safetensors and JSON that appears whole or not at all, and is verified before use."""

import base64
import errno
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import transformers
from torch import Tensor, nn

from app.domain.decisions import ControllerState
from app.domain.messages import Carry, StepMetrics
from app.errors import TrainingFailed
from workers.training.loop import Run
from workers.training.snapshots import Snapshot, take_snapshot

MANIFEST = "manifest.json"
FORMAT = 1
FULL_DISK = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
FULL_WORDS = ("No space left", "quota exceeded", "File too large")  # of errors without a number
SPACE_FACTOR = 2.2  # of the last checkpoint's size must be free before the next is begun


class DiskFull(Exception):
    """No room for a checkpoint; nothing of it was left behind."""


@dataclass(frozen=True, slots=True)
class Saved:
    """A complete checkpoint."""

    directory: Path
    manifest_sha256: str
    size_bytes: int


def save_checkpoint(run: Run, scratch: Path, attempt: int, *, last_size: int = 0) -> Saved:
    """Writes a run's state as it is; see `write_checkpoint`.

    Args:
        run: Between two steps.
        scratch: The job's scratch directory.
        attempt: Of the job; scopes the path.
        last_size: Bytes of the checkpoint before, for the check of free space.

    Raises:
        DiskFull: There is no room; what was begun has been removed.
    """
    snapshot = take_snapshot(run, make_carry(run), is_copy=False)
    return write_checkpoint(snapshot, scratch, attempt, last_size=last_size)


def write_checkpoint(
    snapshot: Snapshot, scratch: Path, attempt: int, *, last_size: int = 0
) -> Saved:
    """Writes `<scratch>/checkpoints/a<attempt>/b<branch>/step-<step>`.

    Everything goes to a temporary directory first: files, fsync, manifest, fsync, then one rename.

    Args:
        snapshot: Of a run between two steps.
        scratch: The job's scratch directory.
        attempt: Of the job; scopes the path.
        last_size: Bytes of the checkpoint before, for the check of free space.

    Raises:
        DiskFull: There is no room; what was begun has been removed.
    """
    parent = scratch / "checkpoints" / f"a{attempt}" / f"b{snapshot.branch}"
    final = parent / f"step-{snapshot.step}"
    temporary = parent / f".tmp-{snapshot.step}-{uuid.uuid4().hex}"
    try:
        parent.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(parent).free < SPACE_FACTOR * last_size:
            raise DiskFull
        temporary.mkdir()
        saved = _write(snapshot, temporary)
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
        _fsync(parent)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if error.errno in FULL_DISK:
            raise DiskFull from error
        raise
    except safetensors.SafetensorError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if any(word in str(error) for word in FULL_WORDS):
            raise DiskFull from error
        raise
    return Saved(final, *saved)


def load_checkpoint(run: Run, directory: Path, *, keep_carry: bool = False) -> None:
    """Puts a run into a checkpoint's state: weights, optimiser, strategies, step, coefficients.

    Args:
        run: Of the same plan.
        directory: A checkpoint.
        keep_carry: Leaves data cursors, RNGs and the counts over all branches as they are: a rollback.

    Raises:
        TrainingFailed: It is torn, changed, or of another plan (`bad_checkpoint`).
    """
    verify_checkpoint(directory)
    try:
        state = json.loads((directory / "state.json").read_text())
        weights = _load_tensors(directory / "model.safetensors", run.ctx.device)
        optimizer = _load_tensors(directory / "optimizer.safetensors", run.ctx.device)
        if state["task_index"] != run.ctx.task_index:
            run.enter(state["task_index"])
        _load_weights(run, weights)
        _load_optimizer(run, optimizer)
        for strategy in run.strategies:
            own = dict(state["strategies"][strategy.kind])
            own["tensors"] = _load_tensors(
                directory / f"strategy-{strategy.kind}.safetensors", run.ctx.device
            )
            strategy.load_state_dict(own)
    except (KeyError, ValueError, safetensors.SafetensorError) as error:
        raise TrainingFailed(
            f"The checkpoint {directory.name} does not fit this job: {error}", code="bad_checkpoint"
        ) from error
    run.step = state["step"]
    run.branch = state["branch"]
    run.not_finite_in_a_row = state["not_finite_in_a_row"]
    run.history = [StepMetrics.model_validate(row) for row in state["history"]]
    if not keep_carry:
        set_carry(run, Carry.model_validate(state["carry"]))
    run.use(ControllerState.model_validate(state["controller"]))


def load_weights(directory: Path, device: torch.device) -> dict[str, Tensor]:
    """A checkpoint's trained parameters by name, verified."""
    verify_checkpoint(directory)
    return _load_tensors(directory / "model.safetensors", device)


@torch.no_grad()
def set_weights(model: nn.Module, directory: Path) -> dict[str, nn.Parameter]:
    """Gives a model what a checkpoint saved; what is trained in it, by name.

    Raises:
        TrainingFailed: The checkpoint is torn, or of another model (`bad_checkpoint`).
    """
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    device = next(model.parameters()).device
    saved = load_weights(directory, device)
    if saved.keys() != params.keys() or any(saved[n].shape != p.shape for n, p in params.items()):
        raise TrainingFailed("The checkpoint does not fit the base model.", code="bad_checkpoint")
    for name, parameter in params.items():
        parameter.copy_(saved[name])
    return params


def verify_checkpoint(directory: Path) -> None:
    """Compares every file's size and sha256 with the manifest.

    Raises:
        TrainingFailed: Something is missing or differs (`bad_checkpoint`).
    """
    try:
        manifest = json.loads((directory / MANIFEST).read_text())
        changed = [
            name
            for name, facts in manifest["files"].items()
            if (directory / name).stat().st_size != facts["size"]
            or _sha256(directory / name) != facts["sha256"]
        ]
    except (OSError, ValueError, KeyError) as error:
        raise TrainingFailed(
            f"The checkpoint {directory.name} can't be read: {error}", code="bad_checkpoint"
        ) from error
    if changed:
        raise TrainingFailed(
            f"In the checkpoint {directory.name} {changed[0]} is not what was saved.",
            code="bad_checkpoint",
        )


def make_carry(run: Run) -> Carry:
    """What a rollback does not rewind."""
    rng = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        rng["cuda"] = torch.cuda.get_rng_state(run.ctx.device)
    return Carry(
        cursors={
            "streams": run.sampler.state(),
            "executed": run.executed,
            "trained_tokens": run.trained_tokens,
        },
        rng={
            name: base64.b64encode(state.numpy().tobytes()).decode() for name, state in rng.items()
        },
    )


def set_carry(run: Run, carry: Carry) -> None:
    """Takes up data cursors, RNGs and the counts over all branches."""
    run.sampler.load_state(carry.cursors["streams"])
    run.executed = carry.cursors["executed"]
    run.trained_tokens = carry.cursors["trained_tokens"]
    for name, text in carry.rng.items():
        state = torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
        if name == "torch":
            torch.set_rng_state(state)
        elif torch.cuda.is_available():
            torch.cuda.set_rng_state(state, run.ctx.device)


def _write(snapshot: Snapshot, directory: Path) -> tuple[str, int]:
    for name, content in snapshot.tensors.items():
        safetensors.torch.save_file(dict(content), directory / f"{name}.safetensors")
    state = {
        **snapshot.state,
        "carry": snapshot.carry.model_dump(mode="json"),
        "history": [row.model_dump(mode="json") for row in snapshot.history],
    }
    (directory / "state.json").write_text(json.dumps(state))
    files = sorted(path for path in directory.iterdir())
    manifest = {
        "format": FORMAT,
        "step": snapshot.step,
        "branch": snapshot.branch,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "files": {p.name: {"size": p.stat().st_size, "sha256": _sha256(p)} for p in files},
    }
    for path in files:
        _fsync(path)
    text = json.dumps(manifest, sort_keys=True, indent=1)
    (directory / MANIFEST).write_text(text)
    _fsync(directory / MANIFEST)
    _fsync(directory)
    size = sum(p.stat().st_size for p in directory.iterdir())
    return hashlib.sha256(text.encode()).hexdigest(), size


def _load_weights(run: Run, weights: Mapping[str, Tensor]) -> None:
    if weights.keys() != run.all_params.keys():
        odd = sorted(weights.keys() ^ run.all_params.keys())[:3]
        raise ValueError(f"parameters differ, as {odd}")
    with torch.no_grad():
        for name, parameter in run.all_params.items():
            if weights[name].shape != parameter.shape:
                raise ValueError(f"{name} has another shape")
            parameter.copy_(weights[name])


def _load_optimizer(run: Run, tensors: Mapping[str, Tensor]) -> None:
    run.optimizer.zero_grad(set_to_none=True)
    run.optimizer.state.clear()
    for key, value in tensors.items():
        entry, _, name = key.partition("/")
        state: dict[str, Any] = run.optimizer.state[run.ctx.params[name]]
        # Counts of steps stay on the host unless the kernel reads them: an optimiser makes them there.
        is_host = entry == "step" and not run.optimizer.defaults.get("fused")
        state[entry] = value.cpu() if is_host else value.clone()


def _load_tensors(path: Path, device: torch.device) -> dict[str, Tensor]:
    return dict(safetensors.torch.load_file(path, device=str(device)))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
