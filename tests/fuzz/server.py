"""A real API over real servers, filled with one of each thing that a request can name."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from uuid import UUID

import httpx
from sqlalchemy.orm import Session

from app.db.models import Job, Project
from app.db.session import build_engine, build_session_factory, transaction
from app.domain.identifiers import public_id
from app.domain.scopes import Scope
from app.domain.states import JobState
from app.embedded import EmbeddedServices
from app.embedded.processes import find_free_port
from app.services.keys import create_key
from app.services.model_files import open_source, read_facts
from app.services.storage import Storage
from app.settings import Settings
from tests.databases import ROOT, migrate
from tests.factories import make_checkpoint, make_job, make_project
from tests.stored import store_base_model, store_benchmark, store_file
from tests.tiny import make_tiny_model

ROWS = (
    '{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}\n' * 40
)
ITEMS = "".join(
    f'{{"id": "i{n}", "question": "{n}?", "choices": ["a", "b"], "answer": 0}}\n' for n in range(40)
)


@dataclass(frozen=True)
class Target:
    """What is attacked."""

    url: str
    key: str
    process: "subprocess.Popen[bytes]"
    log: Path
    #: Public ids of what exists, by the name of the parameter that takes them.
    ids: dict[str, str]

    def resident_bytes(self) -> int:
        """Memory that the API process holds now."""
        fields = Path(f"/proc/{self.process.pid}/statm").read_text().split()
        return int(fields[1]) * os.sysconf("SC_PAGE_SIZE")


@contextmanager
def running_target(root: Path) -> Iterator[Target]:
    """Postgres, Redis and one API process without limits of rate or number; gone afterwards."""
    services = EmbeddedServices(root / "servers", is_durable=False)
    try:
        endpoints = services.start()
        migrate(endpoints.database_url)
        settings = Settings(
            data_dir=root / "data",
            database_url=endpoints.database_url,
            redis_url=endpoints.redis_url,
        )
        with _api(settings, root, *_fill(settings, root)) as target:
            yield target
    finally:
        services.stop()


@contextmanager
def _api(settings: Settings, root: Path, key: str, ids: dict[str, str]) -> Iterator[Target]:
    port = find_free_port()
    environment = os.environ | {
        "RETAIN_DATABASE_URL": settings.database_url or "",
        "RETAIN_REDIS_URL": settings.redis_url or "",
        "RETAIN_DATA_DIR": str(settings.data_dir),
        "RETAIN_REQUESTS_PER_MINUTE_PER_KEY": "0",
        "RETAIN_REQUESTS_PER_MINUTE_PER_PROJECT": "0",
        "RETAIN_MAX_QUEUED_JOBS": "1000000",
        "RETAIN_MAX_WAIT_SECONDS": "0.2",  # of long polls: their answers are what is looked at
        "RETAIN_MAX_STREAM_SECONDS": "0.2",
        "RETAIN_MAX_UPLOAD_BYTES": str(4 * 2**20),
        "OMP_NUM_THREADS": "1",
    }
    line = ["-m", "uvicorn", "app.main:create_app_from_environment", "--factory"]
    line += ["--port", str(port), "--log-level", "warning"]
    log = root / "api.log"
    with log.open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, *line], env=environment, cwd=ROOT, stdout=output, stderr=output
        )
    try:
        url = f"http://127.0.0.1:{port}"
        _wait(url, process, log)
        yield Target(url, key, process, log, ids)
    finally:
        process.kill()
        process.wait()


def _wait(url: str, process: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx.get(f"{url}/readyz", timeout=5).status_code == 200:
                httpx.get(f"{url}/openapi.json", timeout=60)  # the first one takes seconds to make
                return
        except httpx.TransportError:
            time.sleep(0.1)
    raise AssertionError(f"the API did not come up\n{log.read_text()[-4000:]}")


def _fill(settings: Settings, root: Path) -> tuple[str, dict[str, str]]:
    assert settings.database_url is not None
    make_tiny_model(root / "base")  # before the transaction: it imports torch
    engine = build_engine(settings.database_url)
    with transaction(build_session_factory(engine)) as session:
        project = make_project(session, name="acme")
        scopes = tuple(scope for scope in Scope)
        key = create_key(session, project_id=project.id, name="key", scopes=scopes).text
        ids = fill_project(session, Storage(settings.storage_root), project, root)
    engine.dispose()
    return key, ids


def fill_project(
    session: Session, storage: Storage, project: Project, root: Path
) -> dict[str, str]:
    """A base model `llama`, files, a benchmark and an ended job, under the ids that the examples name."""
    with open_source(str(root / "base"), revision=None, token=None, scratch=root) as source:
        facts = asdict(read_facts(source))
    has_template = facts.pop("has_chat_template")
    base = store_base_model(
        session,
        storage,
        root / "base",
        name="llama",
        details=facts,
        has_chat_template=has_template,
    )
    rows = store_file(session, storage, project, ROWS, root / "rows", id=UUID(int=1))
    base.general_file_id = store_file(session, storage, None, ROWS, root / "rows").id
    told = {"scorer": "multiple_choice", "num_items": 40, "chance_level": 0.5}
    items = store_file(
        session,
        storage,
        project,
        ITEMS,
        root / "rows",
        id=UUID(int=2),
        purpose="evals",
        report=told,
    )
    store_benchmark(session, items, 40, name="reasoning", project=project)
    job: Job = make_job(
        session,
        project,
        id=UUID(int=3),
        base_model_id=base.id,
        training_file_id=rows.id,
        state=JobState.SUCCEEDED,
    )
    checkpoint = make_checkpoint(session, job)
    job.report = {"checkpoint_id": str(checkpoint.id), "frontier": []}
    return {
        "file_id": public_id("file", rows.id),
        "fine_tuning_job_id": public_id("job", job.id),
        "benchmark": "reasoning",
        "model": "llama",
    }
