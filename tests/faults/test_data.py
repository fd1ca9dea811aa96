"""Row F34: poisoned data sets are refused with their lines, or caught by the loop while they do harm."""

import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from app.db.models import DecisionRow, ModelVersion, Project
from app.db.session import transaction
from app.domain.configs.quadratic import L2SpConfig
from app.domain.policy import EarlyStopping, Ladder, Policy, WatchedBenchmark
from app.embedded import Endpoints
from app.services.storage import Storage
from tests.end_to_end.stack import Stack, running_stack
from tests.factories import make_spec, make_training
from tests.faults.fleet import measured
from tests.stored import store_file

pytestmark = [pytest.mark.faults, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def stack(
    servers: Endpoints, template_url: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Stack]:
    with running_stack(servers, template_url, tmp_path_factory.mktemp("poison")) as stack:
        yield stack


def flipped() -> list[str]:
    """Texts like those of the benchmark, with every digit turned into its letter."""
    dice = random.Random(3)
    return [
        " ".join("".join(dice.choices("abcdefghij", k=7)) for _ in range(14)) for _ in range(200)
    ]


def flood() -> list[str]:
    """One row, two hundred times."""
    return ["ffffff ffffff ffffff ffffff ffffff"] * 200


@pytest.mark.parametrize("poison", [flipped, flood])
def test_f34_poison_is_rolled_back_within_two_evaluations(stack: Stack, tmp_path: Path, poison):
    rows = "".join(json.dumps({"text": text}) + "\n" for text in poison())
    storage = Storage(stack.settings.storage_root)
    with transaction(stack.factory) as session:
        project = session.get_one(Project, stack.ids["project"])
        stack.ids["rows"] = store_file(session, storage, project, rows, tmp_path).id
    policy = Policy(
        benchmarks=(WatchedBenchmark(name=stack.benchmark),),
        eval_interval=10,
        gate_items=20,
        ladder=Ladder(repair=False),
        early_stopping=EarlyStopping(enabled=False),
    )
    training = make_training(
        total_steps=30,
        learning_rate=1e-2,
        batch_size=16,
        max_seq_length=128,
        max_tokens_per_micro_batch=2048,
    )
    spec = make_spec(training=training, strategies=(L2SpConfig(strength=0.01),), policy=policy)
    job_id = stack.submit(spec)
    job = stack.ends(job_id)
    decisions = stack.rows(DecisionRow, job_id)
    actions = [decision.action for decision in decisions]
    assert "roll_back" in actions[:2], actions
    rolled_back = decisions[actions.index("roll_back")]
    assert rolled_back.decision["state"]["strengths"]["l2sp"] > 0.01  # what it runs on with
    for version in stack.rows(ModelVersion, job_id):
        assert version.retention in {"held", "unproven"}
    measured("F34", poison=poison.__name__, actions=" ".join(actions), ended=job.state.value)
