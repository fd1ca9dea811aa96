"""Rows F19 to F21: full disks, torn checkpoints, and kills in the middle of a save; the trainer's own code."""

import os
import resource
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch

from app.db.models import Checkpoint
from app.db.session import transaction
from app.domain.configs.quadratic import EwcConfig
from app.domain.states import JobState
from app.errors import TrainingFailed
from app.services.control import resume_job
from app.services.storage import Storage
from tests.faults.fleet import Fleet, measured
from tests.faults.processes import eventually
from tests.faults.proxy import Proxy
from tests.workers.training.runs import make_plan, make_run, same, weights
from workers.training import checkpoints
from workers.training.checkpoints import DiskFull, load_checkpoint, save_checkpoint
from workers.training.loop import train_step

NUM_FILES = 4  # of a checkpoint of this run, without its manifest
STEPS = 4


def make(tmp_path: Path) -> Any:
    return make_run(make_plan(tmp_path, strategies=(EwcConfig(fisher_samples=8),)))


def in_a_child(work: Callable[[], object]) -> int:
    """Runs work in a forked copy of this process; its exit status, negative for a signal."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def after(call: Callable[..., Any], calls: int, then: Callable[..., object]) -> Callable[..., Any]:
    """The call, and something that happens instead of its n-th time."""
    left = [calls]

    def wrapped(*arguments: Any, **named: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            then()
        return call(*arguments, **named)

    return wrapped


#: Where the process is killed; each is set up in the child alone.
POINTS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "before-the-second-file": lambda patch: patch.setattr(
        safetensors.torch, "save_file", after(safetensors.torch.save_file, 2, die)
    ),
    "before-the-first-fsync": lambda patch: patch.setattr(os, "fsync", after(os.fsync, 1, die)),
    "before-the-manifest": lambda patch: patch.setattr(
        Path, "write_text", after(Path.write_text, 2, die)
    ),
    "before-the-manifest's-fsync": lambda patch: patch.setattr(
        os, "fsync", after(os.fsync, NUM_FILES + 1, die)
    ),
    "before-the-rename": lambda patch: patch.setattr(Path, "rename", after(Path.rename, 1, die)),
    "before-the-parent's-fsync": lambda patch: patch.setattr(
        os, "fsync", after(os.fsync, NUM_FILES + 3, die)
    ),
    "after-all-of-it": lambda patch: patch.setattr(
        checkpoints, "_fsync", after(checkpoints._fsync, NUM_FILES + 4, die)
    ),
}


@pytest.mark.parametrize("point", POINTS)
def test_f21_kill_during_a_save_leaves_the_older_checkpoint_or_a_whole_one(
    tmp_path: Path, point: str
):
    undisturbed = make(tmp_path / "undisturbed")
    for _ in range(STEPS):
        train_step(undisturbed)
    run = make(tmp_path)
    train_step(run)
    older = save_checkpoint(run, tmp_path, 1)
    train_step(run)

    def save_and_die() -> None:
        with pytest.MonkeyPatch.context() as patch:
            POINTS[point](patch)
            save_checkpoint(run, tmp_path, 1)
        die()

    assert in_a_child(save_and_die) == -signal.SIGKILL
    whole = sorted(older.directory.parent.glob("step-*"))
    assert older.directory in whole
    resumed = make(tmp_path / "resumed")
    load_checkpoint(resumed, whole[-1])  # verifies every file of it
    lost = run.step - resumed.step
    assert lost == (0 if point.startswith(("before-the-parent", "after")) else 1)
    while resumed.step < STEPS:
        train_step(resumed)
    assert same(weights(resumed), weights(undisturbed))
    save_checkpoint(run, tmp_path, 1)  # what was left lies in nobody's way
    measured("F21", killed=point, steps_lost=lost)


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["before", "after"])
def test_f21_worker_killed_at_the_commit_of_a_checkpoint_costs_at_most_two_intervals(
    fleet: Fleet, moment: Any
):
    job_id = fleet.submit(steps=40)
    with Proxy(fleet.settings.database_url or "") as proxy:
        worker = fleet.worker(database_url=proxy.url)
        fleet.reaches(job_id, 6)
        killed = threading.Event()

        def kill() -> None:
            worker.kill()
            killed.set()

        proxy.at_commit(b"INSERT INTO checkpoints", moment, kill)
        eventually(killed.is_set, "the commit")
    step = fleet.job(job_id).step
    fleet.control()
    fleet.worker(scratch="elsewhere")
    job = fleet.ends(job_id)
    assert job.run_plan is not None
    lost = step - job.run_plan["resume"]["step"]
    assert lost <= 2 * 5
    fleet.check_history(job_id, attempts=2)
    measured("F21", killed=f"{moment} the row's commit", steps_lost=lost)


def test_f19_disk_that_fills_up_leaves_the_older_checkpoint_and_no_debris(tmp_path: Path):
    run = make(tmp_path)
    train_step(run)
    older = save_checkpoint(run, tmp_path, 1)
    train_step(run)

    def save_with_little_room() -> None:
        limit = older.size_bytes // 8
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        with pytest.raises(DiskFull):
            save_checkpoint(run, tmp_path, 1)
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
        train_step(run)  # goes on

    assert in_a_child(save_with_little_room) == 0
    assert list(older.directory.parent.iterdir()) == [older.directory]
    load_checkpoint(make(tmp_path / "again"), older.directory)
    measured("F19", debris=0, older="intact")


@pytest.mark.slow
def test_f19_job_without_room_for_two_checkpoints_is_paused_and_goes_on_later(fleet: Fleet):
    job_id = fleet.submit(steps=60)
    full = fleet.worker("fills_the_disk", "--max-file-bytes", "100000")
    eventually(lambda: fleet.job(job_id).state is JobState.PAUSED, "it pauses", tail=fleet.tail)
    told = fleet.events(job_id, "disk_full")
    assert [(e.data or {}).get("step") for e in told][:3] == [10, 15, None]
    assert told[2].message.startswith("There was no room for 2 checkpoints in a row.")
    kept = [c.step for c in fleet.rows(Checkpoint, job_id)]
    assert kept == [0, 5]
    names = Storage(fleet.settings.storage_root).list_names(f"jobs/{job_id.hex}/checkpoints/a1/b0")
    assert names == ["step-0", "step-5"]
    full.terminate()
    full.wait(30)
    with transaction(fleet.factory) as session:
        resume_job(session, project_id=fleet.job(job_id).project_id, job_id=job_id)
    fleet.worker(scratch="roomy")
    job = fleet.ends(job_id)
    assert job.crashes_without_progress == 0
    assert job.run_plan is not None
    assert job.run_plan["resume"]["step"] == 5
    measured("F19", missed=2, then="paused", resumed_at=5)


def harm(directory: Path, how: str) -> None:
    """Damages a stored checkpoint."""
    weights = directory / "model.safetensors"
    weights.chmod(0o644)
    content = weights.read_bytes()
    if how == "torn":
        weights.write_bytes(content[:-3])
    elif how == "flipped":
        weights.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    else:
        (directory / "manifest.json").unlink()


@pytest.mark.slow
def test_f20_three_damaged_checkpoints_give_way_to_the_one_before(fleet: Fleet):
    job_id = fleet.submit(steps=60)
    worker = fleet.worker()
    fleet.reaches(job_id, 17)
    eventually(lambda: len(fleet.rows(Checkpoint, job_id)) >= 4, "four checkpoints")
    worker.kill()
    root = Path(fleet.settings.storage_root)
    valid = [c for c in fleet.rows(Checkpoint, job_id) if c.deleted_at is None]
    for row, how in zip(reversed(valid), ("torn", "flipped", "manifest"), strict=False):
        harm(root / row.path, how)
    fleet.control()
    fleet.worker(scratch="elsewhere")
    job = fleet.ends(job_id)
    rows = fleet.rows(Checkpoint, job_id)
    assert [c.corrupt for c in rows if c.attempt == 1][-3:] == [True] * 3
    assert job.run_plan is not None
    assert job.run_plan["resume"]["step"] == valid[-4].step
    [claim] = [e for e in fleet.events(job_id, "claimed") if (e.data or {})["attempt"] == 2]
    damaged = fleet.events(job_id, "checkpoint_damaged")
    fell_back_after = (damaged[-1].created_at - claim.created_at).total_seconds()
    assert fell_back_after < 60
    fleet.check_history(job_id, attempts=2)
    measured("F20", damaged=3, fell_back_after_s=fell_back_after)


def test_f20_damaged_files_are_refused_by_the_trainer_before_anything_is_loaded(tmp_path: Path):
    run = make(tmp_path)
    saved = save_checkpoint(run, tmp_path, 1)
    harm(saved.directory, "flipped")
    with pytest.raises(TrainingFailed) as caught:
        load_checkpoint(run, saved.directory)
    assert caught.value.code == "bad_checkpoint"


@pytest.mark.slow
def test_f20_without_any_valid_checkpoint_the_job_fails_and_says_so(fleet: Fleet):
    job_id = fleet.submit(steps=60)
    worker = fleet.worker()
    fleet.reaches(job_id, 7)
    worker.kill()
    worker.wait()
    for row in fleet.rows(Checkpoint, job_id):
        harm(Path(fleet.settings.storage_root) / row.path, "torn")
    fleet.control()
    fleet.worker(scratch="elsewhere")
    job = fleet.ends(job_id, JobState.FAILED)
    assert job.error is not None
    assert job.error["code"] == "no_valid_checkpoint"
    measured("F20", damaged="all", failed_as="no_valid_checkpoint")
