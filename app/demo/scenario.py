"""The three jobs of the demo, and everything that has to be in place before them."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from app.demo.client import JOBS, Client, Json

DOMAIN = "tickets"
NUM_EPOCHS, BATCH_SIZE = 8, 64  # 120 steps over 960 rows
EVERY_STEP = NUM_EPOCHS * 960 // BATCH_SIZE
GATE_ITEMS = 2000
FULL = {"type": "full", "learning_rate": 5e-3, "warmup_ratio": 0.1}
TAG = {"started_by": "retain-demo"}
HOOK_NAME = "retain-demo"
HOOKS = (
    "fine_tuning.job.succeeded",
    "fine_tuning.job.failed",
    "fine_tuning.job.cancelled",
    "retention.regression_detected",
    "retention.strength_raised",
    "retention.rolled_back",
)


@dataclass(frozen=True, slots=True)
class Base:
    """What the builder left in a directory."""

    directory: Path
    manifest: Json
    digest: str  # of the manifest, which holds the digest of every file

    @classmethod
    def read(cls, directory: Path) -> "Base":
        """From its `demo.json`."""
        content = (directory / "demo.json").read_bytes()
        return cls(directory, json.loads(content), hashlib.sha256(content).hexdigest()[:8])

    @property
    def model_name(self) -> str:
        """What jobs call it: another content, another name."""
        return f"demo-{self.digest}"

    @property
    def general(self) -> list[Json]:
        """The benchmarks of its suite."""
        return list(self.manifest["benchmarks"])

    @property
    def domain(self) -> Json:
        """Rows and benchmarks of the domain."""
        found: Json = self.manifest["domains"][DOMAIN]
        return found

    def domain_benchmark(self, scorer: str) -> str:
        """The name of the domain's benchmark of this scorer on the server."""
        return f"{DOMAIN}-{scorer.replace('_', '-')}-{self.digest}"


@dataclass(frozen=True, slots=True)
class Plan:
    """One job of the demo."""

    title: str
    why: str
    body: Json


def clear_away(client: Client) -> None:
    """Cancels jobs and removes receivers that an interrupted demo left."""
    for job in client.pages(JOBS, limit=100, **{"metadata[started_by]": TAG["started_by"]}):
        if job["status"] not in {"succeeded", "failed", "cancelled"}:
            client.post(f"{JOBS}/{job['id']}/cancel")
    for endpoint in client.pages("/v1/webhook_endpoints", limit=100):
        if endpoint["name"] == HOOK_NAME:
            client.delete(f"/v1/webhook_endpoints/{endpoint['id']}")


def add_domain_benchmarks(client: Client, base: Base) -> None:
    """Registers the domain's benchmarks where the project has none of this content."""
    known = {row["name"] for row in client.pages("/v1/benchmarks", limit=100)}
    for benchmark in base.domain["benchmarks"]:
        name = base.domain_benchmark(benchmark["scorer"])
        if name in known:
            continue
        file = client.upload(base.directory / benchmark["file"], "evals")
        body = {"name": name, "file": file, "kind": "domain", "scorer": benchmark["scorer"]}
        client.post("/v1/benchmarks", body)


def add_receiver(client: Client, url: str) -> tuple[str, str]:
    """Registers a webhook receiver; its id and its signing secret."""
    body = {"name": HOOK_NAME, "url": url, "event_types": list(HOOKS)}
    made = client.post("/v1/webhook_endpoints", body)
    return str(made["id"]), str(made["signing_secret"])


def plan_jobs(client: Client, base: Base, seed: int) -> dict[str, Plan]:
    """Uploads the domain's rows and writes the three requests."""
    rows = {
        "training_file": client.upload(base.directory / base.domain["train"], "fine-tune"),
        "validation_file": client.upload(base.directory / base.domain["validation"], "fine-tune"),
    }
    watched = [{"name": row["name"], "weight": row["weight"]} for row in base.general]
    watched += [{"name": base.domain_benchmark(row["scorer"])} for row in base.domain["benchmarks"]]
    numbers = {"n_epochs": NUM_EPOCHS, "batch_size": BATCH_SIZE}
    common: dict[str, Any] = rows | {
        "model": base.model_name,
        "method": {"type": "supervised", "supervised": {"hyperparameters": numbers}},
        "metadata": TAG,
        "seed": seed,
    }
    # Without a strategy and with limits that nothing reaches, the sensor only looks, once, at the end.
    off = {
        "benchmarks": watched,
        "max_drop": 0.999,
        "max_nll_increase": 1e6,
        "eval_interval": EVERY_STEP,
        "gate_items": 200,
        "early_stopping": {"enabled": False},
    }
    controlled = {
        "benchmarks": watched,
        "eval_interval": 15,
        "gate_items": GATE_ITEMS,
        "eval_budget": 0.5,
        "early_stopping": {"enabled": False},
        "ladder": {
            "repair": False,
            "rollback_strength_factor": 10,
            "rollback_learning_rate_factor": 1,
        },
    }
    return {
        "plain": Plan(
            "plain",
            "full fine-tuning with nothing against forgetting; the sensor looks once, nothing acts",
            common
            | {"suffix": "plain", "training": FULL}
            | {"retention": {"strategies": [], "policy": off}},
        ),
        "controlled": Plan(
            "controlled",
            "the same with EWC at strength 1, a hundred times too low, and the controller on",
            common
            | {"suffix": "controlled", "training": FULL}
            | {
                "retention": {
                    "strategies": [{"type": "ewc", "strength": 1, "fisher_clip": 1}],
                    "policy": controlled,
                }
            },
        ),
        "default": Plan(
            "defaults",
            "the same, saying nothing about strategies or limits: the defaults choose",
            common
            | {"suffix": "defaults", "training": FULL}
            | {"retention": {"policy": {"benchmarks": watched}}},
        ),
    }


def submit(client: Client, plan: Plan, say: Callable[[str], None]) -> Json:
    """Submits a job and says what the server answered."""
    job = client.post(JOBS, plan.body)
    for warning in job["warnings"]:
        say(f"warning: {warning.get('message', warning)}")
    if job.get("strategies_why"):
        say(str(job["strategies_why"]))
    return job
