"""The application in this process over the test's transaction, with one project's key."""

import json
from typing import Any

import pytest
import structlog
from fastapi import FastAPI
from fastapi.testclient import TestClient
from sqlalchemy.orm import Session

from app.db.models import BaseModel, Project
from app.db.session import SessionFactory
from app.domain.scopes import DEFAULT_SCOPES, Scope
from app.main import create_app
from app.services.keys import create_key
from app.settings import Settings
from tests.factories import make_base_model, make_file, make_project

# The default formatter draws every local variable: many seconds for one failed request.
structlog.configure(
    processors=[structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)]
)

CHAT = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}


class Api:
    """A client of one project, and what stands behind it."""

    def __init__(self, app: FastAPI, session: Session, project: Project) -> None:
        self.app = app
        self.session = session
        self.project = project
        self.storage = app.state.resources.storage
        self.settings = app.state.resources.settings
        self.client = self.client_of(project)

    def client_of(self, project: Project, *scopes: Scope) -> TestClient:
        """A client with a new key of a project."""
        key = create_key(
            self.session, project_id=project.id, name="key", scopes=scopes or DEFAULT_SCOPES
        )
        self.session.commit()
        return TestClient(self.app, headers={"authorization": f"Bearer {key.text}"})

    def upload(self, rows: list[Any], purpose: str = "fine-tune", **data: Any) -> Any:
        """Uploads rows and gives the response."""
        body = "".join(json.dumps(row) + "\n" for row in rows).encode()
        return self.upload_bytes(body, purpose, **data)

    def upload_bytes(self, body: bytes, purpose: str = "fine-tune", **data: Any) -> Any:
        """Uploads bytes and gives the response."""
        return self.client.post(
            "/v1/files", files={"file": ("f.jsonl", body)}, data={"purpose": purpose} | data
        )

    def submit(self, **body: Any) -> Any:
        """Submits a job on the base model and gives the response."""
        if "training_file" not in body:
            body["training_file"] = self.upload([CHAT] * 40).json()["id"]
        return self.client.post("/v1/fine_tuning/jobs", json={"model": "tiny"} | body)

    def stored_files(self) -> list[str]:
        """Names of what lies in the store."""
        return list(self.storage.list_names("files"))


@pytest.fixture
def api(session_factory: SessionFactory, session: Session, settings: Settings) -> Api:
    small = settings.model_copy(update={"max_upload_bytes": 100_000, "max_json_bytes": 20_000})
    app = create_app(small, session_factory)
    return Api(app, session, make_project(session, name="acme"))


@pytest.fixture
def base(api: Api) -> BaseModel:
    """A base model without general data and without a suite."""
    base = make_base_model(api.session, name="tiny")
    api.session.commit()
    return base


@pytest.fixture
def base_with_general_data(api: Api, base: BaseModel) -> BaseModel:
    """The base model with general data of the operator."""
    base.general_file_id = make_file(api.session).id
    api.session.commit()
    return base
