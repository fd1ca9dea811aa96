"""What an attempt reads from its worker's disk, and where each thing lies there."""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple
from uuid import UUID

from sqlalchemy.orm import Session

from app.db.models import Checkpoint, Job
from app.domain.runplan import BasePlan
from app.errors import NotFound, TrainingFailed
from app.services.start import plan_start, start_of


@dataclass(frozen=True, slots=True)
class Input:
    """Something stored that a run reads from local disk."""

    path: str  # under the storage root
    local: Path
    sha256: str
    is_directory: bool


@dataclass(frozen=True, slots=True)
class SavedState:
    """A stored checkpoint, to be brought to local disk and verified there by its manifest."""

    checkpoint_id: UUID
    path: str  # under the storage root
    local: Path
    manifest_sha256: str


class StartInput(NamedTuple):
    """A job's starting model, and what is brought for it."""

    plan: BasePlan
    inputs: tuple[Input, ...]
    states: tuple[SavedState, ...]  # checkpoints of other jobs


@dataclass(frozen=True, slots=True)
class Scratch:
    """Where things lie on a worker's disk; an attempt's own directory is shared with no other attempt.

    Args:
        root: Of all.
        job_id: Whose.
        attempt: Which.
        keeps_rows: Whether rows, and what is computed of them, may stay when the attempt is over.
    """

    root: Path
    job_id: UUID
    attempt: int
    keeps_rows: bool = True

    @property
    def directory(self) -> Path:
        """The attempt's own."""
        return self.root / "jobs" / self.job_id.hex / f"a{self.attempt}"

    @property
    def cache(self) -> Path:
        """Computed once for all jobs, keyed by hashes; of a job whose rows are not kept, its attempt's own."""
        return (self.root if self.keeps_rows else self.directory) / "cache"

    def input(self, sha256: str) -> Path:
        """An input, named by its contents and shared by all jobs."""
        return self.root / "inputs" / sha256

    def file(self, sha256: str) -> Path:
        """A file of rows or items, shared by all jobs that may keep rows."""
        return self.input(sha256) if self.keeps_rows else self.directory / "files" / sha256

    def start(self, manifest_sha256: str) -> Path:
        """Another job's checkpoint that the attempt starts from."""
        return self.directory / "fetched" / manifest_sha256

    def checkpoint(self, checkpoint: Checkpoint) -> Path:
        """A stored checkpoint's local copy."""
        point = f"b{checkpoint.branch}/step-{checkpoint.step}"
        return self.directory / "fetched" / f"a{checkpoint.attempt}" / point


def start_input(session: Session, job: Job, scratch: Scratch) -> StartInput:
    """Where the job starts, as its plan names it and as it is brought.

    Raises:
        TrainingFailed: A version or checkpoint that it starts from is gone.
    """
    start = start_of(session, job)
    try:
        plan, parts = plan_start(session, start.base, start.version, start.checkpoint)
    except NotFound as error:
        raise TrainingFailed(error.message, "model", error.code) from error
    local = [
        scratch.input(part.sha256) if part.checkpoint_id is None else scratch.start(part.sha256)
        for part in parts
    ]
    layers = [
        layer.model_copy(update={"directory": str(path)})
        for layer, path in zip(plan.layers, local[1:], strict=True)
    ]
    return StartInput(
        plan.model_copy(update={"directory": str(local[0]), "layers": tuple(layers)}),
        tuple(
            Input(part.path, path, part.sha256, is_directory=True)
            for part, path in zip(parts, local, strict=True)
            if part.checkpoint_id is None
        ),
        tuple(
            SavedState(part.checkpoint_id, part.path, path, part.sha256)
            for part, path in zip(parts, local, strict=True)
            if part.checkpoint_id is not None
        ),
    )
