"""A job of pairs from the official client to a published model, over a real stack whose trainer is killed once."""

import json
import os
import signal
from collections.abc import Iterator

import openai
import pytest

from app.db.models import BaseModel
from app.db.session import transaction
from app.domain.identifiers import parse_id, public_id
from app.embedded import Endpoints
from tests.end_to_end.stack import Stack, running_stack, served, trainers

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


@pytest.fixture
def stack(
    servers: Endpoints, template_url: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Stack]:
    with running_stack(servers, template_url, tmp_path_factory.mktemp("pairs")) as stack:
        yield stack


def pairs(count: int, word: str) -> bytes:
    """Letters are preferred to digits, whatever is asked."""
    rows = [
        {
            "input": {"messages": [{"role": "user", "content": f"{word} {n}"}]},
            "preferred_output": [{"role": "assistant", "content": "abc"[n % 3] * 4}],
            "non_preferred_output": [{"role": "assistant", "content": "123"[n % 3] * 4}],
        }
        for n in range(count)
    ]
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def test_a_client_tunes_on_pairs_and_gets_a_model(stack: Stack) -> None:
    with transaction(stack.factory) as session:
        base = session.get_one(BaseModel, stack.ids["base"]).name
    with served(stack) as (url, key):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0)
        files = [
            client.files.create(file=(f"{word}.jsonl", pairs(count, word)), purpose="fine-tune").id
            for word, count in (("train", 60), ("valid", 12))
        ]
        made = client.fine_tuning.jobs.create(
            model=base,
            training_file=files[0],
            validation_file=files[1],
            seed=3,
            method={
                "type": "dpo",
                "dpo": {"hyperparameters": {"n_epochs": 4, "batch_size": 6, "beta": 0.5}},
            },
            extra_body={
                "training": {"learning_rate": 5e-3, "max_seq_length": 64, "checkpoint_interval": 4},
                "retention": {
                    "strategies": [{"type": "replay", "strength": 0.5}, {"type": "ewc"}],
                    "general_data": public_id("file", stack.ids["general"]),
                    "policy": {
                        "benchmarks": [{"name": "digits"}],
                        "max_nll_increase": 1e6,
                        "eval_interval": 10,
                        "gate_items": 20,
                    },
                },
            },
        )
        assert made.method is not None
        assert made.method.dpo is not None
        assert made.method.dpo.hyperparameters is not None
        assert made.method.dpo.hyperparameters.beta == 0.5
        job_id = parse_id("job", made.id)
        stack.saves(job_id, 4, branch=0)
        for pid in trainers(job_id):
            os.kill(pid, signal.SIGKILL)
        ended = stack.ends(job_id)
        assert ended.error is None
        stack.check_history(job_id, attempts=2)
        job = client.fine_tuning.jobs.retrieve(made.id)
        assert job.status == "succeeded"
        assert job.fine_tuned_model is not None
        assert client.models.retrieve(job.fine_tuned_model).id == job.fine_tuned_model
        assert job.hyperparameters.n_epochs == 4
        points = client.fine_tuning.jobs.checkpoints.list(job.id).data
        last = max(points, key=lambda point: point.step_number)
        assert last.step_number == 40
        told = last.metrics.model_dump()
        assert told["train_reward_accuracy"] == 1.0
        assert told["valid_reward_accuracy"] == 1.0
        assert told["valid_reward_margin"] > 0.5
        assert told["full_valid_loss"] < 0.5
        events = client.fine_tuning.jobs.list_events(job.id, limit=100).data
        looks = [event.data for event in events if event.type == "metrics" and event.data]
        assert any("valid_reward_margin" in data for data in looks if isinstance(data, dict))
        columns = client.files.content(job.result_files[0]).read().decode().splitlines()[0]
        assert {"train_reward_margin", "valid_reward_accuracy"} <= set(columns.split(","))
