"""`retain benchmarks`: what a project requires, on the data directory's database; tasks of the harness."""

import sys
from contextlib import contextmanager

import pytest
from sqlalchemy.orm import Session
from typer.testing import CliRunner

from app.cli.benchmarks import benchmarks, require
from app.db.models import Project
from app.db.session import SessionFactory
from app.errors import NotFound
from app.services.watched import list_required
from tests.factories import make_benchmark, make_project


@pytest.fixture
def project(
    session: Session, session_factory: SessionFactory, monkeypatch: pytest.MonkeyPatch
) -> Project:
    """A project of the test's transaction, which the commands then work on."""

    @contextmanager
    def open_here(_settings: object, *, command: str | None = None):
        yield session_factory

    monkeypatch.setattr(sys.modules[require.__module__], "open_database", open_here)
    return make_project(session, name="acme")


def run(*arguments: str):
    return CliRunner().invoke(benchmarks, list(arguments))


def test_a_benchmark_is_required_listed_and_released(session: Session, project: Project) -> None:
    make_benchmark(session, name="safety")
    done = run("require", "safety", "--project", "acme", "--weight", "2", "--max-drop", "0.02")
    assert (done.exit_code, done.stdout.strip()) == (0, "safety@1"), done.exception
    (found,) = list_required(session, project.id)
    assert (found.weight, found.limit) == (2.0, 0.02)
    assert "safety@1" in run("required", "--project", "acme").stdout
    assert run("release", "safety", "--project", "acme").exit_code == 0
    assert list_required(session, project.id) == []
    assert isinstance(run("release", "safety", "--project", "acme").exception, NotFound)


def test_a_task_that_cannot_be_imported_ends_with_status_1_and_leaves_nothing(tmp_path) -> None:
    done = run("import-task", "nope", "--out", str(tmp_path / "o"), "--include-path", str(tmp_path))
    assert done.exit_code == 1
    assert not (tmp_path / "o").exists()
