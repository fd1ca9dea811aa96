"""Finished runs calibrate the estimates of later jobs; row files are read for their lengths."""

import json
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.orm import Session

from app.db.models import BaseModel, MeasuredRun
from app.db.session import SessionFactory
from app.domain.estimates_calibration import Measured
from app.domain.spec import CreateJob
from app.domain.states import JobState
from app.services.estimate_rows import guess_bytes_per_token, measure_rows, sample_tokens
from app.services.estimates import (
    estimate_job,
    keep_measured,
    list_calibrations,
    measured_device,
)
from app.services.storage import Storage
from tests.factories import make_base_model, make_file, make_job, make_project, make_spec
from tests.shapes import llama_shape

SHAPE = llama_shape(hidden=256, inner=512, layers=6, heads=4, vocab=4096)


def make_measured(**changes: Any) -> Measured:
    values: dict[str, Any] = {
        "device": "Some CPU",
        "device_type": "cpu",
        "threads": 1,
        "memory_bytes": 8 * 2**30,
        "world_size": 1,
        "peak_bytes": 400_000_000,
        "steps": 10,
        "step_seconds": 20.0,
        "cpu_seconds": 19.0,
        "rows": 80,
        "tokens": 6400,
        "supervised": 6000,
        "pairs": 6400 * 80,
        "micros": 10,
        "largest": (8, 80, 640),
        "mean_row_tokens": 80.0,
    }
    return Measured(**values | changes)


@pytest.fixture
def base(session: Session) -> BaseModel:
    details = {"vocab_size": 4096, "shape": SHAPE.model_dump(mode="json")}
    return make_base_model(session, name="measured", details=details)


def finish(session: Session, base: BaseModel, measured: Measured, **job: Any) -> None:
    row = make_job(session, base_model_id=base.id, state=JobState.SUCCEEDED, **job)
    keep_measured(session, row, measured)


def test_a_finished_run_is_kept_once(session: Session, base: BaseModel) -> None:
    job = make_job(session, base_model_id=base.id, state=JobState.SUCCEEDED)
    keep_measured(session, job, make_measured())
    keep_measured(session, job, make_measured(steps=99))
    keep_measured(session, job, None)
    rows = session.query(MeasuredRun).all()
    assert [(row.device_class, row.measured["steps"]) for row in rows] == [("Some CPU x1", 10)]


def test_device_classes_are_told_apart_and_the_latest_comes_first(
    session: Session, base: BaseModel
) -> None:
    finish(session, base, make_measured(device="Old CPU"))
    finish(session, base, make_measured(threads=2))
    slow = make_measured(
        device="NVIDIA A100-SXM4-80GB", device_type="cuda", memory_bytes=80 * 2**30
    )
    finish(session, base, slow)
    found = list_calibrations(session)
    assert [each.device.name for each in found] == [
        "NVIDIA A100-SXM4-80GB",
        "Some CPU x2",
        "Old CPU x1",
    ]
    assert [each.calibration.runs for each in found] == [1, 1, 1]


def test_runs_of_several_ranks_or_stages_teach_nothing(session: Session, base: BaseModel) -> None:
    finish(session, base, make_measured(world_size=2))
    other = make_base_model(session)  # nothing is known of its layers
    finish(session, other, make_measured())
    assert list_calibrations(session) == ()


def test_a_gpu_is_known_by_its_drivers_name() -> None:
    found = measured_device(
        make_measured(device="NVIDIA H100 80GB HBM3", device_type="cuda", memory_bytes=85 * 10**9)
    )
    a100 = measured_device(make_measured(device="NVIDIA A100-SXM4-80GB", device_type="cuda"))
    assert found.rates.seconds_per_flop < a100.rates.seconds_per_flop
    assert (found.name, found.memory_bytes) == ("NVIDIA H100 80GB HBM3", 85 * 10**9)


def test_an_estimate_after_a_run_is_what_the_run_took(
    session: Session, session_factory: SessionFactory, base: BaseModel, tmp_path: Path
) -> None:
    """The same job again: within a few per cent of the measured step and peak, tokens included."""
    project = make_project(session)
    storage = Storage(str(tmp_path))
    text = "".join(json.dumps({"text": "word " * 40}) + "\n" for _ in range(80))
    stored = storage.put_bytes(text.encode(), "files/rows")
    file = make_file(
        session,
        project,
        path=stored.path,
        sha256=stored.sha256,
        size_bytes=stored.size_bytes,
        report={"format": "text", "num_rows": 80},
    )
    body = CreateJob.model_validate(
        {
            "model": "measured",
            "training_file": f"file-{file.id.hex}",
            "training": {"type": "full"},
            "retention": None,
            "method": {"supervised": {"hyperparameters": {"n_epochs": 1, "batch_size": 8}}},
        }
    )
    session.commit()
    before = estimate_job(session_factory, storage, project.id, body)
    assert before.main.calibrated_runs == 0
    assert before.main.device == "NVIDIA A100-80GB"

    finish(session, base, make_measured(), training_file_id=file.id, spec=_plain_spec())
    session.commit()
    after = estimate_job(session_factory, storage, project.id, body)
    assert after.main.device == "Some CPU x1"
    assert after.main.calibrated_runs == 1
    assert after.main.train_tokens == pytest.approx(80 * 80, rel=0.05)
    assert after.main.seconds_per_step == pytest.approx(2.0, rel=0.05)
    assert after.main.memory.peak == pytest.approx(400_000_000, rel=0.05)
    assert "not_calibrated" not in {warning["code"] for warning in after.warnings}
    assert after.may_proceed


def test_a_device_that_is_too_small_says_so(
    session: Session, session_factory: SessionFactory, base: BaseModel, tmp_path: Path
) -> None:
    project = make_project(session)
    file = make_file(session, project)
    small = make_measured(memory_bytes=2 * 2**30, peak_bytes=1_900_000_000)
    finish(session, base, small, spec=_plain_spec())
    session.commit()
    body = CreateJob.model_validate(
        {"model": "measured", "training_file": f"file-{file.id.hex}", "training": {"type": "full"}}
    )
    found = estimate_job(session_factory, Storage(str(tmp_path)), project.id, body)
    assert found.main.fits is False
    assert not found.may_proceed
    assert not found.is_whole  # nothing lies in the store: one guessed row stands for all


def test_only_the_beginning_of_a_large_file_is_read(session: Session, tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    row = {"messages": [{"role": "user", "content": "a" * 1000}]}
    row["messages"].append({"role": "assistant", "content": "b" * 1000})
    data = (json.dumps(row) + "\n").encode() * 2000
    stored = storage.put_bytes(data, "files/large")
    file = make_file(session, path=stored.path, sha256=stored.sha256, size_bytes=stored.size_bytes)
    found = measure_rows(storage, file)
    assert 0.4 < found.share_read < 0.6
    assert set(found.rows) == {(2000, 1000, 2, 1)}
    sample = sample_tokens(found, num_rows=2000, bytes_per_token=4.0, max_tokens=300)
    assert (sample.rows[0].read, sample.num_rows) == (300, 2000)
    longer = sample_tokens(found, num_rows=2000, bytes_per_token=4.0, max_tokens=3000)
    assert longer.rows[0] == (508, 251)


def test_bytes_of_a_token_follow_the_vocabulary() -> None:
    assert guess_bytes_per_token(300) == 1.0
    assert guess_bytes_per_token(32_000) == pytest.approx(4.0, abs=0.1)
    assert guess_bytes_per_token(None) == 4.0
    assert guess_bytes_per_token(10**9) == 5.0


def _plain_spec() -> dict[str, Any]:
    return make_spec(model="measured").model_dump(mode="json")
