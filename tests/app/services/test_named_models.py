"""Models that strategies name: their kinds, what submit refuses, and how they get to the run."""

import json
from functools import partial
from pathlib import Path

import pytest
from sqlalchemy.orm import Session
from typer.testing import CliRunner

from app.cli.models import models as models_cli
from app.db.repositories.registry import RegistryRepository
from app.db.session import SessionFactory
from app.domain.configs.base import ModelKind
from app.domain.configs.memory import MemoryConfig
from app.domain.runplan import RunPlan
from app.domain.spec import JobSpec
from app.domain.states import JobState
from app.errors import BadRequest, Conflict, NotFound, TrainingFailed
from app.services.models import add_model, add_other_model
from app.services.named_models import check_named_models, list_stored_models, model_kind
from app.services.runs import build_run_plan
from app.services.scratch import Scratch
from app.services.storage import Storage
from app.settings import Settings
from tests.app.services.test_jobs import Stand
from tests.app.services.test_models import safetensors
from tests.factories import make_base_model, make_job, make_model_version, make_project, make_spec

ENCODER = {"kind": "encoder", "num_parameters": 10}
CLIP = {
    "architectures": ["CLIPModel"],
    "projection_dim": 512,
    "text_config": {"vocab_size": 50},
    "vision_config": {"image_size": 16},
}
MARIAN = {"architectures": ["MarianMTModel"], "is_encoder_decoder": True}
LLAMA = {"architectures": ["LlamaForCausalLM"], "vocab_size": 50}


class Referring(MemoryConfig):
    """A strategy that reads causal models."""

    names: tuple[str, ...] = ()

    def named_models(self) -> tuple[tuple[str, str], ...]:
        """Each by its place in the list."""
        return tuple((f"names.{place}", name) for place, name in enumerate(self.names))


@pytest.fixture
def stand(session: Session) -> Stand:
    return Stand(session)


def retention(encoder: str) -> dict[str, object]:
    return {"strategies": [{"type": "l2sp"}, {"type": "memory", "encoder": encoder}]}


def test_a_strategy_may_name_a_registered_encoder(stand: Stand) -> None:
    encoder = make_base_model(stand.session, name="clip", details=ENCODER)
    job = stand.submit(retention=retention("clip"))
    spec = JobSpec.model_validate(job.spec)
    assert spec.strategies[1].named_models() == (("encoder", "clip"),)
    assert model_kind(encoder) == "encoder"


@pytest.mark.parametrize(
    ("name", "error", "code"),
    [
        ("unknown", NotFound, "model_not_found"),
        ("ft:unknown", NotFound, "model_not_found"),
        ("causal", BadRequest, "wrong_model_kind"),
    ],
)
def test_a_model_that_is_missing_or_of_another_kind_is_refused_at_its_field(
    stand: Stand, name: str, error: type[NotFound | BadRequest], code: str
) -> None:
    make_base_model(stand.session, name="causal")
    with pytest.raises(error) as caught:
        stand.submit(retention=retention(name))
    assert (caught.value.param, caught.value.code) == ("retention.strategies.1.encoder", code)


def test_jobs_train_causal_models_alone(stand: Stand) -> None:
    stand.base.details = ENCODER
    with pytest.raises(BadRequest, match="of kind encoder") as caught:
        stand.submit()
    assert (caught.value.param, caught.value.code) == ("model", "model_not_supported")


def test_a_published_version_is_named_like_a_base_model(session: Session) -> None:
    job = make_job(session)
    ready, pending = (
        make_model_version(session, job),
        make_model_version(session, job, status="pending", path=None, sha256=None),
    )
    config = Referring(names=(ready.name, ready.name))
    check_named_models(session, job.project_id, (config,))
    (stored,) = list_stored_models(session, job.project_id, (config,))
    assert stored == (ready.name, ready.path, ready.sha256)
    with pytest.raises(BadRequest) as caught:
        check_named_models(session, job.project_id, (Referring(names=(ready.name, pending.name)),))
    assert (caught.value.param, caught.value.code) == (
        "retention.strategies.0.names.1",
        "model_not_ready",
    )
    with pytest.raises(NotFound):  # another project's
        check_named_models(session, make_project(session).id, (config,))
    with pytest.raises(BadRequest, match="of kind causal_lm"):
        check_named_models(session, job.project_id, (MemoryConfig(encoder=ready.name),))
    RegistryRepository(session).mark_deleted(ready)
    with pytest.raises(TrainingFailed) as failed:
        list_stored_models(session, job.project_id, (config,))
    assert failed.value.code == "model_not_found"


def test_a_run_gets_the_models_that_its_strategies_name(
    session: Session, settings: Settings, tmp_path: Path
) -> None:
    encoder = make_base_model(session, name="clip", details=ENCODER)
    spec = make_spec(strategies=(MemoryConfig(encoder="clip"),))
    job = make_job(session, spec=spec.model_dump(mode="json"), state=JobState.RUNNING)
    prepared = build_run_plan(session, job, settings, Scratch(tmp_path, job.id, 1))
    assert isinstance(prepared.plan, RunPlan)
    local = tmp_path / "inputs" / encoder.sha256
    assert prepared.plan.models == {"clip": str(local)}
    (item,) = [i for i in prepared.inputs if i.local == local]
    assert (item.path, item.sha256, item.is_directory) == (encoder.path, encoder.sha256, True)
    assert job.run_plan is not None
    assert job.run_plan["models"] == prepared.plan.models


def test_a_model_that_is_the_jobs_own_base_is_brought_once(
    session: Session, settings: Settings, tmp_path: Path
) -> None:
    base = make_base_model(session, name="both", details=ENCODER)
    spec = make_spec(strategies=(MemoryConfig(encoder="both"),))
    job = make_job(
        session, spec=spec.model_dump(mode="json"), state=JobState.RUNNING, base_model_id=base.id
    )
    prepared = build_run_plan(session, job, settings, Scratch(tmp_path, job.id, 1))
    assert len([i for i in prepared.inputs if i.sha256 == base.sha256]) == 1
    assert isinstance(prepared.plan, RunPlan)
    assert prepared.plan.models == {"both": prepared.plan.base.directory}


def write_model(directory: Path, config: dict[str, object], *names: str) -> Path:
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "model.safetensors").write_bytes(safetensors({"a": [50, 8]}))
    for name in names:
        (directory / name).write_text("x")
    return directory


@pytest.mark.parametrize(
    ("kind", "config", "names"),
    [
        ("encoder", CLIP, ("merges.txt",)),
        ("seq2seq", MARIAN, ("source.spm", "target.spm")),
    ],
)
def test_other_kinds_are_registered_with_all_that_they_need(
    session_factory: SessionFactory,
    settings: Settings,
    tmp_path: Path,
    kind: ModelKind,
    config: dict[str, object],
    names: tuple[str, ...],
) -> None:
    source = write_model(tmp_path / "model", config, *names)
    model = add_other_model(session_factory, settings, name="m", source=str(source), kind=kind)
    assert model_kind(model) == kind
    stored = Storage(settings.storage_root).list_names(model.path)
    assert stored == sorted(["config.json", "model.safetensors", *names])
    with pytest.raises(Conflict):
        add_other_model(session_factory, settings, name="m", source=str(source), kind=kind)


@pytest.mark.parametrize(
    ("kind", "config", "message"),
    [
        ("encoder", LLAMA, "no text and image tower"),
        ("encoder", MARIAN, "no text and image tower"),
        ("seq2seq", LLAMA, "no encoder and decoder"),
        ("causal_lm", CLIP, "kind encoder"),
    ],
)
def test_a_model_of_another_kind_is_refused(
    session_factory: SessionFactory,
    settings: Settings,
    tmp_path: Path,
    kind: ModelKind,
    config: dict[str, object],
    message: str,
) -> None:
    source = str(write_model(tmp_path / "model", config))
    add = partial(add_other_model, kind=kind) if kind != "causal_lm" else add_model
    with pytest.raises(BadRequest, match=message):
        add(session_factory, settings, name="m", source=source)


def test_other_kinds_have_no_suite(tmp_path: Path) -> None:
    arguments = ["add", "m", str(tmp_path), "--kind", "encoder", "--benchmark", "arc"]
    result = CliRunner().invoke(models_cli, [*arguments, "--data-dir", str(tmp_path)])
    assert isinstance(result.exception, BadRequest)
    assert "never trained" in str(result.exception)


def test_models_from_before_kinds_are_causal(session: Session) -> None:
    assert "kind" not in make_base_model(session).details
    assert model_kind(make_base_model(session)) == "causal_lm"
