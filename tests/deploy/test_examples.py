"""The client examples, run as they are against a server on a real port."""

import importlib.util
import math
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
import pytest
import torch
from torch import nn
from torch.utils.data import Dataset

from app.db.session import SessionFactory
from app.settings import Settings
from tests.external import ITEMS, RIGHT
from tests.serving import make_caller, serving
from tests.tiny import make_llama

EXAMPLES = Path(__file__).resolve().parents[2] / "deploy" / "examples"


def load(name: str) -> ModuleType:
    """An example as a module."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def server(
    settings: Settings, committed_factory: SessionFactory
) -> Iterator[tuple[str, httpx.Client]]:
    _, key = make_caller(committed_factory, settings)
    with serving(settings, committed_factory) as url:
        head = {"authorization": f"Bearer {key}"}
        with httpx.Client(base_url=f"{url}/v1", headers=head, timeout=30) as client:
            yield url, client


def decisions(client: httpx.Client, run: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = client.get(f"/{run}/decisions").json()["data"]
    return found


def test_plain_http_trains_under_watch(server, monkeypatch, capsys) -> None:
    url, client = server
    monkeypatch.setenv("RETAIN_BASE_URL", url)
    monkeypatch.setenv("RETAIN_API_KEY", client.headers["authorization"].removeprefix("Bearer "))
    run = load("plain_http").train("general", [f"i{n}" for n in range(ITEMS)])
    made = decisions(client, f"runs/{run}")
    actions = [row["action"] for row in made]
    assert actions[0] == "keep"
    assert "raise_strength" in actions
    told = [row for row in made if row["instructions"]]
    assert told
    assert all(row["acknowledged_step"] is not None for row in told)
    shown = client.get(f"/runs/{run}").json()
    assert (shown["status"], shown["step"]) == ("succeeded", 100)
    assert shown["strengths"]["l2"] > 1
    assert "ended with" in capsys.readouterr().out


class Rows(Dataset[dict[str, torch.Tensor]]):
    """Token rows, the same each time."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, place: int) -> dict[str, torch.Tensor]:
        ids = torch.arange(16) * 7 % 250 + place % 8
        return {"input_ids": ids, "labels": ids}


class Training:
    """A tiny model under the callback; items are forgotten as its weights move away from where they began."""

    def __init__(self, tmp_path: Path, url: str, key: str, *, steps: int) -> None:
        from transformers import Trainer, TrainingArguments

        torch.manual_seed(0)
        self.model = make_llama(vocab_size=300, hidden=16, layers=1)
        self.start = [p.detach().clone() for p in self.model.parameters()]
        self.strengths: dict[str, float] = {}
        self.drifts: list[float] = []
        self.on_score: Any = None
        example = load("transformers_callback")
        run = {
            "model": "tiny-llama",
            "policy": {"benchmarks": [{"name": "general"}]},
            "levers": [{"type": "l2", "strength": 0.5}],
        }
        client = example.Retain(url, key)
        self.callback = example.RetainCallback(client, run, self.score, self.strengths.__setitem__)
        arguments = TrainingArguments(
            output_dir=str(tmp_path / "out"),
            per_device_train_batch_size=4,
            max_steps=steps,
            learning_rate=2e-3,
            lr_scheduler_type="constant",
            eval_strategy="steps",
            eval_steps=5,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            dataloader_pin_memory=False,
            disable_tqdm=True,
        )
        self.trainer = Trainer(
            model=self.model,
            args=arguments,
            train_dataset=Rows(),
            eval_dataset=Rows(),
            callbacks=[self.callback],
        )

    def drift(self) -> float:
        """How far the weights are from where they began."""
        pairs = zip(self.model.parameters(), self.start, strict=True)
        return math.sqrt(sum(float((now.detach() - then).square().sum()) for now, then in pairs))

    def score(self, _model: nn.Module) -> dict[str, dict[str, float]]:
        self.drifts.append(self.drift())
        if self.on_score is not None:
            self.on_score()
        lost = min(int(self.drifts[-1] * 400), RIGHT)
        return {"general": {f"i{n}": float(lost <= n < RIGHT) for n in range(ITEMS)}}


def test_the_callback_turns_scales_and_restores_a_real_trainer(server, tmp_path) -> None:
    url, client = server
    key = client.headers["authorization"].removeprefix("Bearer ")
    training = Training(tmp_path, url, key, steps=15)
    training.trainer.train()
    made = decisions(client, training.callback.path)
    assert [row["step"] for row in made[:1]] == [5]
    rollbacks = [row for row in made if row["action"] == "roll_back"]
    assert rollbacks, [(row["action"], row["reason"]) for row in made]
    first = rollbacks[0]
    assert first["instructions"][0] == {"type": "roll_back", "step": 0, "branch": 1}
    assert first["acknowledged_step"] == 1
    assert training.strengths["l2"] == made[-1]["after"]["strengths"]["l2"] > 0.5
    assert training.trainer.optimizer is not None
    rate = 2e-3 * made[-1]["after"]["learning_rate_scale"]
    assert rate < 2e-3
    assert training.trainer.optimizer.param_groups[0]["lr"] == pytest.approx(rate)
    # After the rollback the next evaluation is at step 5 again, on branch 1, from the restored weights.
    second = made[1]
    assert (second["branch"], second["step"]) == (1, 5)
    assert training.drifts[2] < training.drifts[1]
    saved = tmp_path / "out" / "retain-0" / "model.safetensors"
    load("transformers_callback").load_model(training.model, str(saved))
    assert training.drift() == 0
    shown = client.get(f"/{training.callback.path}").json()
    assert (shown["status"], shown["branch"]) == ("succeeded", made[-1]["after"]["branch"])


def test_a_person_stops_a_real_trainer(server, tmp_path) -> None:
    url, client = server
    key = client.headers["authorization"].removeprefix("Bearer ")
    training = Training(tmp_path, url, key, steps=40)

    def order() -> None:
        made = decisions(client, training.callback.path)
        if len(made) == 1:
            body = {"action": "stop", "reason": "the data was wrong"}
            path = f"/{training.callback.path}/decisions/{made[0]['id']}/override"
            assert client.post(path, json=body).status_code == 200

    training.on_score = order
    training.trainer.train()
    assert training.trainer.state.global_step == 10
    made = decisions(client, training.callback.path)
    stop = next(row for row in made if row["code"] == "override_stop")
    assert stop["instructions"] == [{"type": "stop"}]
    assert stop["acknowledged_step"] is not None
    assert stop["ordered"]["reason"] == "the data was wrong"
