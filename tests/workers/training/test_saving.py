"""Checkpoints that are written beside training: the state of their step, told in order, and never in the way."""

import threading

import pytest

from app.domain.configs.quadratic import EwcConfig
from app.domain.configs.replay import ReplayConfig
from app.domain.messages import EXIT_DONE
from tests.workers.training.rows import make_supervisor
from tests.workers.training.runs import make_plan, make_run
from workers.training import saving, snapshots
from workers.training.checkpoints import DiskFull, make_carry, save_checkpoint, write_checkpoint
from workers.training.loop import train_step
from workers.training.snapshots import take_snapshot

STRATEGIES = (EwcConfig(fisher_samples=8), ReplayConfig(strength=0.25))


def contents(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_a_copy_that_is_written_later_is_the_state_of_its_step(tmp_path):
    run = make_run(make_plan(tmp_path, strategies=STRATEGIES))
    for _ in range(2):
        train_step(run)
    at_once = save_checkpoint(run, tmp_path / "at-once", 1)
    snapshot = take_snapshot(run, make_carry(run), is_copy=True)
    for _ in range(2):
        train_step(run)
    later = write_checkpoint(snapshot, tmp_path / "later", 1)
    assert contents(later.directory) == contents(at_once.directory)
    assert later.manifest_sha256 == at_once.manifest_sha256


def test_saves_beside_training_are_told_in_order_and_before_the_evaluation(tmp_path):
    supervisor = make_supervisor(tmp_path, training={"checkpoint_interval": 1})
    assert supervisor.run_here() == EXIT_DONE
    saved = supervisor.of("checkpoint_saved")
    assert [m.step for m in saved] == list(range(13))
    assert [m.step for m in saved if m.is_evaluated] == [4, 8, 12]
    told = [
        (m.type, m.step)
        for _, m in supervisor.messages
        if m.type in ("checkpoint_saved", "evaluated")
    ]
    assert told.index(("checkpoint_saved", 7)) < told.index(("checkpoint_saved", 8))
    assert told.index(("checkpoint_saved", 8)) < told.index(("evaluated", 8))


def test_training_goes_on_while_a_slow_disk_writes(tmp_path, monkeypatch):
    supervisor = make_supervisor(tmp_path, training={"checkpoint_interval": 5, "total_steps": 12})
    may_write = threading.Event()
    steps = []
    write, report = write_checkpoint, train_step

    def write_slowly(*arguments, **named):
        assert may_write.wait(30), "training waits for the disk"
        return write(*arguments, **named)

    def step_on(run):
        metrics = report(run)
        steps.append(run.step)
        if run.step == 7:  # two steps after the save began
            may_write.set()
        return metrics

    monkeypatch.setattr(saving, "write_checkpoint", write_slowly)
    monkeypatch.setattr("workers.training.flow.train_step", step_on)
    assert supervisor.run_here() == EXIT_DONE
    assert steps == list(range(1, 13))
    assert [m.step for m in supervisor.of("checkpoint_saved")] == [0, 4, 5, 8, 10, 12]


def test_a_full_disk_beside_training_is_warned_of_and_a_stop_saves_again(tmp_path, monkeypatch):
    supervisor = make_supervisor(
        tmp_path, with_suite=False, training={"checkpoint_interval": 3, "total_steps": 5}
    )

    def fail(*_, **__):
        raise DiskFull

    monkeypatch.setattr(saving, "write_checkpoint", fail)
    assert supervisor.run_here() == EXIT_DONE
    assert [m.step for m in supervisor.of("checkpoint_saved")] == [0, 5]
    assert [(m.code, m.data["step"]) for m in supervisor.of("note")] == [("disk_full", 3)]


def test_another_failure_of_the_writer_ends_the_attempt(tmp_path, monkeypatch):
    supervisor = make_supervisor(
        tmp_path, with_suite=False, training={"checkpoint_interval": 3, "total_steps": 5}
    )

    def fail(*_, **__):
        raise PermissionError("read-only")

    monkeypatch.setattr(saving, "write_checkpoint", fail)
    with pytest.raises(PermissionError):
        supervisor.run_here()


def test_without_memory_for_a_copy_a_checkpoint_is_written_at_once(tmp_path, monkeypatch):
    supervisor = make_supervisor(
        tmp_path, with_suite=False, training={"checkpoint_interval": 3, "total_steps": 5}
    )
    monkeypatch.setattr(snapshots, "available_bytes", lambda: 1000)
    monkeypatch.setattr(saving, "write_checkpoint", None)  # is not called
    assert supervisor.run_here() == EXIT_DONE
    assert [m.step for m in supervisor.of("checkpoint_saved")] == [0, 3, 5]
