"""Jobs that go on from what others made, from the official client to published models, over a real stack."""

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from app.db.models import BaseModel, Job, ModelVersion
from app.db.session import transaction
from app.domain.identifiers import parse_id, public_id
from app.embedded import Endpoints
from app.services.storage import Storage
from tests.end_to_end.stack import Stack, running_stack, served

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def stack(
    servers: Endpoints, template_url: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Stack]:
    with running_stack(servers, template_url, tmp_path_factory.mktemp("starts")) as stack:
        yield stack


def test_jobs_go_on_from_a_model_from_a_checkpoint_and_again(stack: Stack) -> None:
    with transaction(stack.factory) as session:
        base = session.get_one(BaseModel, stack.ids["base"])
    with served(stack) as (url, key):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0)

        def tune(model: str, kind: str = "lora") -> Any:
            made = client.fine_tuning.jobs.create(
                model=model,
                training_file=public_id("file", stack.ids["rows"]),
                validation_file=public_id("file", stack.ids["validation"]),
                seed=3,
                method={
                    "type": "supervised",
                    "supervised": {"hyperparameters": {"n_epochs": 1, "batch_size": 20}},
                },
                extra_body={
                    "training": {
                        "type": kind,
                        "learning_rate": 5e-3,
                        "max_seq_length": 64,
                        "checkpoint_interval": 5,
                    },
                    "retention": {
                        "strategies": [{"type": "l2sp", "strength": 1e-4}],
                        "policy": {
                            "benchmarks": [{"name": stack.benchmark}],
                            "max_nll_increase": 10.0,
                            "eval_interval": 5,
                        },
                    },
                },
            )
            return finished(made.id)

        def finished(job_id: str) -> Any:
            row = stack.ends(parse_id("job", job_id))
            assert row.state.value == "succeeded", (row.error, stack.log.read_text()[-3000:])
            return client.fine_tuning.jobs.retrieve(job_id)

        first = tune(base.name)
        second = tune(first.fine_tuned_model)
        assert second.model == first.fine_tuned_model
        shown: Any = client.models.retrieve(second.fine_tuned_model)
        assert (shown.parent, shown.root) == (first.fine_tuned_model, base.name)
        # it goes on: the second one's validation begins where the first one's ended
        assert losses(client, second)[0] < losses(client, first)[0]
        assert rank(stack, second) == 2 * rank(stack, first)
        saved = client.fine_tuning.jobs.checkpoints.list(second.id).data[-2]
        third = tune(saved.fine_tuned_model_checkpoint, "full")
        assert third.model == saved.fine_tuned_model_checkpoint
        shown = client.models.retrieve(third.fine_tuned_model)
        assert shown.parent == first.fine_tuned_model
        again: Any = client.post(f"/fine_tuning/jobs/{second.id}/rerun", cast_to=dict, body={})
        twin = finished(again["id"])
        assert weights(stack, twin) == weights(stack, second)


def losses(client: openai.OpenAI, job: Any) -> list[float]:
    """Training losses of a job, by step."""
    lines = client.files.content(job.result_files[0]).text.splitlines()
    place = lines[0].split(",").index("train_loss")
    return [float(line.split(",")[place]) for line in lines[1:] if line.split(",")[place]]


def version(stack: Stack, job: Any) -> ModelVersion:
    with transaction(stack.factory) as session:
        row = session.get_one(Job, parse_id("job", job.id))
        return session.get_one(ModelVersion, row.model_version_id)


def rank(stack: Stack, job: Any) -> int:
    path = f"{version(stack, job).path}/adapter_config.json"
    return int(json.loads(Storage(stack.settings.storage_root).read_bytes(path))["r"])


def weights(stack: Stack, job: Any) -> bytes:
    path = f"{version(stack, job).path}/adapter_model.safetensors"
    return Storage(stack.settings.storage_root).read_bytes(path)
