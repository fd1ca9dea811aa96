"""Builders of deployed models: published versions of a watched job, registered and under an alias; real rows."""

import json
from dataclasses import dataclass
from typing import Any

from sqlalchemy.orm import Session

from app.db.models import BaseModel, Benchmark, BenchmarkVersion, File, Job, ModelVersion, Project
from app.domain.aliases import CreateRegisteredModel, Promote, RegisterVersion
from app.domain.configs.quadratic import EwcConfig
from app.domain.identifiers import public_id
from app.domain.scopes import Caller, Scope
from app.domain.spec import JobSpec
from app.services.aliases import promote
from app.services.registered_models import create_registered_model, register_version
from app.services.storage import Storage
from tests.factories import make_file, make_key, make_model_version
from tests.histories import ITEMS, start_job

NAME = "support-bot"
ALIAS = "production"


@dataclass
class Deployed:
    """A registered model whose alias stands on the last of its versions."""

    project: Project
    job: Job
    benchmark: BenchmarkVersion
    benchmark_name: str
    models: list[ModelVersion]
    caller: Caller
    registered_id: str


def make_deployed(
    session: Session,
    *,
    num_versions: int = 2,
    name: str = NAME,
    project: Project | None = None,
    **fields: Any,
) -> Deployed:
    """Versions 1 to n of a registered model, promoted to `production` one after the other.

    The job behind them started from a base with general data, with EWC at strength 1, and its baseline has
    1,200 of 2,000 items right.
    """
    job, (version,) = start_job(session)
    if project is None:
        project = session.get_one(Project, job.project_id)
    for row in (job, session.get_one(Benchmark, version.benchmark_id)):
        row.project_id = project.id
    for file_id in (job.training_file_id, version.file_id):
        session.get_one(File, file_id).project_id = project.id
    base = session.get_one(BaseModel, job.base_model_id)
    base.general_file_id = make_file(session).id
    base.has_chat_template = False  # as the job's plan says
    assert job.training_file_id is not None
    spec = JobSpec.model_validate(job.spec)
    request = spec.request.model_copy(
        update={"model": base.name, "training_file": public_id("file", job.training_file_id)}
    )
    update = {"request": request, "strategies": (EwcConfig(strength=1.0),)}
    job.spec = spec.model_copy(update=update).model_dump(mode="json")
    key = make_key(session, project, name="watchdog")
    scopes = frozenset(Scope) - {Scope.MODELS_FORCE}
    caller = Caller(project_id=project.id, key_id=key.key_id, scopes=scopes)
    made = create_registered_model(session, project.id, CreateRegisteredModel(name=name, **fields))
    models = []
    for number in range(1, num_versions + 1):
        model = make_model_version(session, job)
        register_version(session, project.id, name, RegisterVersion(model=model.name))
        promote(session, caller, name, ALIAS, Promote(version=number))
        models.append(model)
    return Deployed(
        project=project,
        job=job,
        benchmark=version,
        benchmark_name=session.get_one(Benchmark, version.benchmark_id).name,
        models=models,
        caller=caller,
        registered_id=public_id("registered_model", made.id),
    )


def store_items(session: Session, storage: Storage, version: BenchmarkVersion) -> None:
    """The benchmark's file, whose ids are what posted items are matched by."""
    file = session.get_one(File, version.file_id)
    lines = (json.dumps({"id": f"i{n}", "question": "?"}) for n in range(ITEMS))
    storage.put_bytes("\n".join(lines).encode(), file.path)


def items(lost: int = 0, n: int = ITEMS) -> list[dict[str, object]]:
    """As the baseline (the first 1,200 right), but for the first `lost`."""
    return [{"id": f"i{k}", "score": float(lost <= k < 1200)} for k in range(n)]
