"""The path of the demo on real data: a small model trained on the spot, then tuned on medical answers and watched.

Nothing of the data is in this repository; without `../shared/data` the test is skipped and says so.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import select

from app.db.models import DecisionRow, File, Job, JobEvent, ModelVersion
from app.db.session import SessionFactory, transaction
from app.domain.benchmarks import BenchmarkKind, Scorer
from app.domain.controller import decide
from app.domain.decisions import (
    BenchmarkReading,
    ControllerState,
    Decision,
    LeverState,
    Look,
    Reading,
    Verdict,
)
from app.domain.identifiers import public_id
from app.domain.policy import Policy
from app.domain.spec import CreateJob
from app.domain.states import JobState
from app.services.files import FINE_TUNE, NewFile, add_file, store_checked
from app.services.models import add_model, add_operator_benchmark
from app.services.storage import Storage
from app.services.submission import submit_job
from app.settings import Settings
from tests.factories import make_project

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT.parent / "shared" / "data"
GENERAL = ("alpaca_en", "code_instruct", "self_instruct_human")
WAIT_SECONDS = 300.0

VOCAB_SIZE = 2048
CONTEXT = 512  # tokens
PRETRAINING_STEPS = 160
BATCH_ROWS, BATCH_TOKENS = 16, 128

NLL = "general-text"
AT_CHANCE = {
    "arc-easy": 0.25,
    "mmlu": 0.25,
    "bbh-gen": 0.0,
}  # what a model of this size knows of them
ALL = {NLL, *AT_CHANCE}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(
        not DATA.is_dir(), reason="there is no ../shared/data beside the repository"
    ),
]


@dataclass(frozen=True)
class Ended:
    """The job once it has ended, with its model version, events and decisions."""

    job: Job
    version: ModelVersion | None
    events: list[JobEvent]
    decisions: list[DecisionRow]
    log: str


@pytest.fixture
def ended(
    committed_factory: SessionFactory, database: str, redis_url: str, tmp_path: Path
) -> Ended:
    """One job on the medical domain, run by a real engine, worker and trainer; they are gone afterwards."""
    settings = Settings(data_dir=tmp_path / "data", database_url=database, redis_url=redis_url)
    register(committed_factory, settings, tmp_path)
    job_id = submit(committed_factory, settings, tmp_path)
    log = tmp_path / "log"
    processes = [start(module, settings, log) for module in ("app.control", "workers.celery_app")]
    try:
        wait_for_end(committed_factory, job_id, log)
    finally:
        for process in processes:
            process.send_signal(signal.SIGTERM)
        for process in processes:
            stop(process)
    with transaction(committed_factory) as session:
        job = session.get_one(Job, job_id)
        version = session.get(ModelVersion, job.model_version_id) if job.model_version_id else None
        events = session.scalars(
            select(JobEvent).where(JobEvent.job_id == job_id).order_by(JobEvent.sequence)
        ).all()
        decisions = session.scalars(
            select(DecisionRow).where(DecisionRow.job_id == job_id).order_by(DecisionRow.seq)
        ).all()
    return Ended(job, version, list(events), list(decisions), log.read_text(errors="replace"))


def test_a_job_on_real_data_ends_with_a_verdict_of_what_can_be_seen(ended: Ended) -> None:
    job = ended.job
    assert job.state is JobState.SUCCEEDED, (job.error, ended.log[-4000:])
    assert [s["type"] for s in job.spec["strategies"]] == ["replay", "distillation"]
    assert ended.version is not None
    assert ended.version.status == "ready"
    assert ended.version.retention in {"held", "unproven"}  # `unwatched` would mean: no verdict
    assert job.report is not None
    assert ended.version.verdict == job.report["verdict"]
    check_verdict(Reading.model_validate(job.report["verdict"]))
    check_floors_are_told(job, ended.events)
    check_learned(job.report)
    check_decisions(ended.decisions, total_steps=job.spec["training"]["total_steps"])


def check_verdict(verdict: Reading) -> None:
    """Benchmarks at chance say nothing and are in no mean; the text carries the verdict."""
    readings = {reading.name.partition("@")[0]: reading for reading in verdict.benchmarks}
    assert set(readings) == ALL
    for name, chance in AT_CHANCE.items():
        check_floor(readings[name], chance)
    assert (verdict.drop, verdict.lower, verdict.upper) == (None, None, None)
    text = readings[NLL]
    assert text.n_items >= 100
    assert text.baseline is not None
    assert text.value is not None
    assert 2.0 < text.baseline < 7.6  # nats a token; guessing blindly is ln 2048 = 7.6
    assert text.drop == pytest.approx(text.value - text.baseline, abs=1e-4)
    assert text.drop is not None
    assert text.lower is not None
    assert text.upper is not None
    assert text.lower < text.drop < text.upper
    assert text.limit == Policy().max_nll_increase
    assert verdict.verdict is text.verdict
    assert verdict.verdict in {Verdict.PASS, Verdict.INCONCLUSIVE}


def check_floor(reading: BenchmarkReading, chance: float) -> None:
    assert reading.verdict is Verdict.AT_FLOOR
    assert reading.baseline is not None
    assert reading.n_items >= 30
    assert abs(reading.baseline - chance) < 0.15
    assert reading.p_regress is None


def check_floors_are_told(job: Job, events: Iterable[JobEvent]) -> None:
    """As a warning in the log, and in what the job says of its power."""
    assert job.power is not None
    floors = {
        name.partition("@")[0]
        for name, estimate in job.power["benchmarks"].items()
        if estimate["at_floor"]
    }
    assert floors == set(AT_CHANCE)
    told = [e for e in events if (e.data or {}).get("code") == "sensor_power"][-1]
    assert told.level == "warn"
    assert all(name in told.message for name in AT_CHANCE)


def check_learned(report: Mapping[str, Any]) -> None:
    """The line from base to tuned starts at the base, whose validation loss the published model is below."""
    frontier = report["frontier"]
    assert [point["alpha"] for point in frontier] == pytest.approx([n / 10 for n in range(11)])
    base, tuned = frontier[0], frontier[-1]
    assert tuned["valid_loss"] < base["valid_loss"] - 0.05
    assert report["valid_loss"] < base["valid_loss"] - 0.05
    assert {name.partition("@")[0] for name in base["benchmarks"]} == ALL


def check_decisions(rows: list[DecisionRow], *, total_steps: int) -> None:
    """Each follows from the stored evidence alone."""
    assert len(rows) >= 3
    assert rows[-1].step <= total_steps
    for row in rows:
        evidence = row.evidence
        again = decide(
            Policy.model_validate(evidence["policy"]),
            tuple(LeverState.model_validate(lever) for lever in evidence["levers"]),
            ControllerState.model_validate(evidence["state"]),
            Look.model_validate(evidence["look"]),
        )
        assert again == Decision.model_validate(row.decision)


# ---- the job and what it needs --------------------------------------------------------------------


def register(factory: SessionFactory, settings: Settings, root: Path) -> None:
    """The base model with its benchmarks and general rows, as the operator's commands register them."""
    items = {
        "arc-easy": (Scorer.MULTIPLE_CHOICE, short_items("arc_easy", 300, 600)),
        "mmlu": (Scorer.MULTIPLE_CHOICE, short_items("mmlu", 300, 600)),
        "bbh-gen": (
            Scorer.EXACT_MATCH,
            [item | {"max_tokens": 12} for item in short_items("bbh_gen", 120, 200)],
        ),
        NLL: (Scorer.NLL, general_texts(400)),
    }
    for name, (scorer, lines) in items.items():
        file = write(root / f"{name}.jsonl", lines)
        kind = BenchmarkKind.GENERAL
        add_operator_benchmark(factory, settings, name=name, file=file, kind=kind, scorer=scorer)
    rows = [row for name in GENERAL for row in read(f"general/{name}/train.jsonl", 1500)]
    random.Random(0).shuffle(rows)
    train_base(rows, root / "base")
    add_model(
        factory,
        settings,
        name="small",
        source=str(root / "base"),
        benchmarks=dict.fromkeys(items, 1.0),
        general_data=write(root / "general.jsonl", rows[:1000]),
    )


def submit(factory: SessionFactory, settings: Settings, root: Path) -> UUID:
    """A default job but for its length: strategies `auto`, adapters, the suite and policy of the base model."""
    domain = "domains/medical_medquad"
    with transaction(factory) as session:
        project_id = make_project(session).id
    training = add_rows(
        factory,
        settings,
        project_id,
        write(root / "train.jsonl", read(f"{domain}/train.jsonl", 320)),
    )
    validation = add_rows(
        factory,
        settings,
        project_id,
        write(root / "validation.jsonl", read(f"{domain}/validation.jsonl", 40)),
    )
    body = CreateJob.model_validate(
        {
            "model": "small",
            "training_file": training,
            "validation_file": validation,
            "seed": 0,
            "method": {"supervised": {"hyperparameters": {"n_epochs": 3, "batch_size": 16}}},
            "training": {"learning_rate": 3e-3, "max_seq_length": 192},
            "retention": {"policy": {"eval_interval": 20, "gate_items": 100}},
        }
    )
    with transaction(factory) as session:
        return submit_job(session, project_id, body).id


def add_rows(factory: SessionFactory, settings: Settings, project_id: UUID, path: Path) -> str:
    """Uploads a file of training rows and returns its public id."""
    storage = Storage(settings.storage_root)
    settings.scratch_root.mkdir(parents=True, exist_ok=True)
    with (
        store_checked(storage, NewFile(path, path.name, FINE_TUNE), max_bytes=10**8) as checked,
        transaction(factory) as session,
    ):
        file: File = add_file(session, project_id, checked)
        return public_id("file", file.id)


def read(path: str, count: int) -> list[dict[str, Any]]:
    """The first lines of a file of the data."""
    with (DATA / path).open(encoding="utf-8") as file:
        return [json.loads(line) for line in islice(file, count)]


def write(path: Path, lines: Iterable[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def short_items(name: str, count: int, max_chars: int) -> list[dict[str, Any]]:
    """Test items drawn over the whole file, without long ones and with the keys of an item alone."""
    keys = ("id", "question", "choices", "answer", "subject")
    items = [
        {key: item[key] for key in keys if key in item}
        for item in read(f"benchmarks/{name}/test.jsonl", 10**6)
        if len(item["question"]) + sum(map(len, item.get("choices", ()))) <= max_chars
    ]
    return random.Random(0).sample(items, count)


def general_texts(count: int) -> list[dict[str, Any]]:
    """Conversations of the general test sets as items."""
    items = [
        {"id": f"{name}/{number}", "messages": row["messages"], "subject": name}
        for name in GENERAL
        for number, row in enumerate(read(f"general/{name}/test.jsonl", 10**6))
        if sum(len(message["content"]) for message in row["messages"]) <= 900
    ]
    return random.Random(0).sample(items, count)


# ---- the base model -------------------------------------------------------------------------------


def train_base(rows: list[dict[str, Any]], directory: Path) -> None:
    """A Llama of about a million parameters without a chat template, trained on the rows for a minute."""
    import torch
    from torch.nn import functional as F
    from transformers import LlamaConfig, LlamaForCausalLM

    from workers.data.templates import DEFAULT_CHAT_TEMPLATE

    tokenizer = train_tokenizer(rows)
    texts = tokenizer.apply_chat_template(
        [row["messages"] for row in rows], chat_template=DEFAULT_CHAT_TEMPLATE, tokenize=False
    )
    stream = torch.tensor(
        [i for ids in tokenizer(texts, add_special_tokens=False)["input_ids"] for i in ids]
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=VOCAB_SIZE,
                hidden_size=128,
                intermediate_size=384,
                num_hidden_layers=4,
                num_attention_heads=4,
                num_key_value_heads=4,
                max_position_embeddings=CONTEXT,
                tie_word_embeddings=True,
                pad_token_id=tokenizer.pad_token_id,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
            )
        )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 3e-3, total_steps=PRETRAINING_STEPS, pct_start=0.1
    )
    order = torch.Generator().manual_seed(0)
    offsets = torch.arange(BATCH_TOKENS + 1)
    model.train()
    for _ in range(PRETRAINING_STEPS):
        starts = torch.randint(len(stream) - BATCH_TOKENS, (BATCH_ROWS, 1), generator=order)
        ids = stream[starts + offsets]
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def train_tokenizer(rows: list[dict[str, Any]]) -> Any:
    """A byte-level BPE tokenizer of the rows' text."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(
        [message["content"] for row in rows for message in row["messages"]],
        vocab_size=VOCAB_SIZE,
        special_tokens=["<pad>", "<s>", "</s>"],
        show_progress=False,
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer._tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        model_max_length=CONTEXT,
    )


# ---- processes ------------------------------------------------------------------------------------


def start(module: str, settings: Settings, log: Path) -> "subprocess.Popen[bytes]":
    environment = os.environ | {
        "RETAIN_DATABASE_URL": settings.database_url or "",
        "RETAIN_REDIS_URL": settings.redis_url or "",
        "RETAIN_DATA_DIR": str(settings.data_dir),
        "RETAIN_TORCH_THREADS": "1",
        "OMP_NUM_THREADS": "1",
    }
    with log.open("ab") as output:
        return subprocess.Popen(
            [sys.executable, "-m", module],
            env=environment,
            cwd=ROOT,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def stop(process: "subprocess.Popen[bytes]") -> None:
    """Waits for a process that was told to end; one that does not is killed with all it started."""
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_for_end(factory: SessionFactory, job_id: UUID, log: Path) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while time.monotonic() < deadline:
        with transaction(factory) as session:
            if session.get_one(Job, job_id).state.is_terminal:
                return
        time.sleep(0.3)
    raise AssertionError(f"the job did not end\n{log.read_text(errors='replace')[-4000:]}")
