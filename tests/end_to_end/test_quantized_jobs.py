"""A job on a base in nf4, from a request to a model, over a real stack whose trainer is killed once."""

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from sqlalchemy import select

from app.db.models import BaseModel, Evaluation, ModelVersion
from app.db.session import transaction
from app.domain.identifiers import parse_id, public_id
from app.embedded import Endpoints
from tests.end_to_end.stack import Stack, running_stack, served, trainers

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


@pytest.fixture
def stack(
    servers: Endpoints, template_url: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Stack]:
    with running_stack(servers, template_url, tmp_path_factory.mktemp("nf4")) as stack:
        yield stack


def test_a_quantised_job_ends_in_a_model_though_its_trainer_is_killed(stack: Stack) -> None:
    with transaction(stack.factory) as session:
        base = session.get_one(BaseModel, stack.ids["base"])
        name, digest = base.name, base.sha256
    body = {
        "model": name,
        "training_file": public_id("file", stack.ids["rows"]),
        "seed": 3,
        "hyperparameters": {"n_epochs": 4, "batch_size": 6},
        "training": {
            "type": "lora",
            "quantization": "nf4",
            "learning_rate": 5e-3,
            "max_seq_length": 64,
            "checkpoint_interval": 4,
        },
        "retention": {
            "strategies": [{"type": "distillation", "on": ["domain"]}, {"type": "ewc"}],
            "general_data": public_id("file", stack.ids["general"]),
            "policy": {
                "benchmarks": [{"name": "digits"}],
                "max_nll_increase": 1e6,
                "eval_interval": 10,
                "gate_items": 20,
            },
        },
    }
    with (
        served(stack) as (url, key),
        httpx.Client(
            base_url=f"{url}/v1", headers={"authorization": f"Bearer {key}"}, timeout=30
        ) as client,
    ):
        refused = client.post(
            "/fine_tuning/jobs", json=body | {"training": {"type": "full", "quantization": "nf4"}}
        )
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == "training.quantization"
        made = client.post("/fine_tuning/jobs", json=body)
        assert made.status_code == 200, made.text
        job_id = parse_id("job", made.json()["id"])
        stack.saves(job_id, 4, branch=0)
        for pid in trainers(job_id):
            os.kill(pid, signal.SIGKILL)
        ended = stack.ends(job_id)
        assert ended.error is None
        stack.check_history(job_id, attempts=2)
        job = client.get(f"/fine_tuning/jobs/{made.json()['id']}").json()
    assert job["status"] == "succeeded"
    with transaction(stack.factory) as session:
        (version,) = session.scalars(select(ModelVersion)).all()
        assert version.name == job["fine_tuned_model"]
        assert version.kind == "adapter"
        assert version.path is not None
        baselines = session.scalars(select(Evaluation).where(Evaluation.purpose == "baseline"))
        keys = {row.subject_key for row in baselines}
        path = version.path
    assert keys
    assert all(key.startswith(digest) and key.endswith("/nf4") for key in keys)
    record = json.loads(Path(stack.settings.storage_root, path, "retain.json").read_text())
    assert record["quantization"] == "nf4"
