"""Checkpoints appear whole or not at all, and are refused when they are not what was saved."""

import errno
import json

import pytest
import safetensors.torch

from app.domain.configs.quadratic import EwcConfig
from app.errors import TrainingFailed
from tests.workers.training.runs import make_plan, make_run, same, weights
from workers.training.checkpoints import (
    DiskFull,
    load_checkpoint,
    load_weights,
    save_checkpoint,
    verify_checkpoint,
)
from workers.training.loop import train_step


@pytest.fixture
def run(tmp_path):
    run = make_run(make_plan(tmp_path, strategies=(EwcConfig(fisher_samples=8),)))
    train_step(run)
    return run


def test_a_checkpoint_holds_safetensors_and_json_with_a_manifest_of_all_of_it(tmp_path, run):
    saved = save_checkpoint(run, tmp_path, 3)
    assert saved.directory == tmp_path / "checkpoints" / "a3" / "b0" / "step-1"
    names = sorted(path.name for path in saved.directory.iterdir())
    assert names == [
        "manifest.json",
        "model.safetensors",
        "optimizer.safetensors",
        "state.json",
        "strategy-ewc.safetensors",
    ]
    manifest = json.loads((saved.directory / "manifest.json").read_text())
    assert sorted(manifest["files"]) == names[1:]
    assert saved.size_bytes == sum(p.stat().st_size for p in saved.directory.iterdir())
    assert same(load_weights(saved.directory, run.ctx.device), weights(run))


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("harm", ["flip", "cut", "remove"])
def test_a_harmed_file_is_found_before_anything_is_loaded(tmp_path, run, name, harm):
    saved = save_checkpoint(run, tmp_path, 1)
    train_step(run)
    before = weights(run)
    path = saved.directory / name
    content = bytearray(path.read_bytes())
    if harm == "flip":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif harm == "cut":
        path.write_bytes(content[:-1])
    else:
        path.unlink()
    with pytest.raises(TrainingFailed) as caught:
        load_checkpoint(run, saved.directory)
    assert caught.value.code == "bad_checkpoint"
    assert same(weights(run), before)


def test_a_missing_manifest_is_a_bad_checkpoint(tmp_path):
    with pytest.raises(TrainingFailed, match="can't be read"):
        verify_checkpoint(tmp_path)


def test_a_checkpoint_of_another_plan_is_refused(tmp_path, run):
    saved = save_checkpoint(run, tmp_path, 1)
    other = make_run(make_plan(tmp_path, training={"type": "lora"}))
    with pytest.raises(TrainingFailed, match="does not fit"):
        load_checkpoint(other, saved.directory)


def test_too_little_room_is_seen_before_anything_is_written(tmp_path, run):
    with pytest.raises(DiskFull):
        save_checkpoint(run, tmp_path, 1, last_size=2**62)
    assert not list(tmp_path.glob("checkpoints/a1/b0/*"))


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_disk_that_fills_up_leaves_the_older_checkpoint_and_no_debris(
    tmp_path, run, monkeypatch, code
):
    older = save_checkpoint(run, tmp_path, 1)
    train_step(run)

    def fail(*_):
        raise OSError(code, "no room")

    monkeypatch.setattr(safetensors.torch, "save_file", fail)
    with pytest.raises(DiskFull):
        save_checkpoint(run, tmp_path, 1)
    assert list(older.directory.parent.iterdir()) == [older.directory]
    verify_checkpoint(older.directory)
