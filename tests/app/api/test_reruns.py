"""Jobs run again."""

from typing import Any

from app.db.models import BaseModel, Job
from app.domain.identifiers import parse_id, public_id
from app.domain.states import JobState
from tests.app.api.conftest import Api
from tests.factories import make_checkpoint, make_model_version


def ended(api: Api, **body: object) -> Job:
    job = api.session.get_one(Job, parse_id("job", api.submit(**body).json()["id"]))
    job.move_to(JobState.CANCELLED)
    job.finished_at = job.created_at
    api.session.commit()
    return job


def rerun(api: Api, job: Job, **body: Any) -> Any:
    return api.client.post(f"/v1/fine_tuning/jobs/{public_id('job', job.id)}/rerun", **body)


def test_the_same_request_is_run_again_with_the_same_seed(api: Api, base: BaseModel) -> None:
    job = ended(api, metadata={"run": "1"}, suffix="legal", priority=3)
    told = rerun(api, job)
    assert told.status_code == 200
    again = told.json()
    assert again["rerun_of"] == public_id("job", job.id)
    assert again["id"] != public_id("job", job.id)
    assert again["status"] == "queued"
    assert again["seed"] == job.seed
    first = api.client.get(f"/v1/fine_tuning/jobs/{public_id('job', job.id)}").json()
    assert first["rerun_of"] is None
    same = ("model", "training_file", "hyperparameters", "training", "retention", "metadata")
    assert [again[key] for key in same] == [first[key] for key in same]
    assert (again["user_provided_suffix"], again["priority"]) == ("legal", 3)
    other = rerun(api, job, json={"metadata": {"run": "2"}}).json()
    assert other["metadata"] == {"run": "2"}


def test_a_job_that_has_not_ended_is_not_run_again(api: Api, base: BaseModel) -> None:
    job = api.submit().json()
    told = api.client.post(f"/v1/fine_tuning/jobs/{job['id']}/rerun")
    assert told.status_code == 409
    assert told.headers["x-should-retry"] == "false"
    assert told.json()["error"]["code"] == "job_not_ended"


def test_a_job_is_run_on_from_one_of_its_checkpoints(api: Api, base: BaseModel) -> None:
    job = ended(api)
    saved = make_checkpoint(api.session, job, step=7)
    gone = make_checkpoint(api.session, job, step=8, superseded=True)
    foreign = make_checkpoint(api.session, ended(api), step=7)
    api.session.commit()
    again = rerun(api, job, json={"from_checkpoint": public_id("checkpoint", saved.id)}).json()
    row = api.session.get_one(Job, parse_id("job", again["id"]))
    assert row.start_checkpoint_id == saved.id
    assert again["model"].endswith(":ckpt-step-7")
    for other in (gone, foreign):
        told = rerun(api, job, json={"from_checkpoint": public_id("checkpoint", other.id)})
        assert told.status_code == 404
        assert told.json()["error"]["param"] == "from_checkpoint"
    told = rerun(api, job, json={"from_checkpoint": "nonsense"})
    assert (told.status_code, told.json()["error"]["param"]) == (404, "from_checkpoint")
    assert rerun(api, job, json={"checkpoint": "x"}).status_code == 400


def test_a_version_that_a_job_starts_from_is_not_deleted(api: Api, base: BaseModel) -> None:
    version = make_model_version(api.session, ended(api))
    api.session.commit()
    started = api.submit(model=version.name)
    assert started.status_code == 200
    assert started.json()["model"] == version.name
    told = api.client.delete(f"/v1/models/{version.name}")
    assert (told.status_code, told.json()["error"]["code"]) == (409, "model_in_use")
