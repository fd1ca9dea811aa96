"""Files: checked before they are kept, and kept while something needs them."""

from pathlib import Path

import pytest
from sqlalchemy.orm import Session

from app.db.models import File
from app.db.session import SessionFactory, transaction
from app.domain.identifiers import public_id
from app.domain.requests import CreateBenchmark
from app.domain.states import JobState
from app.errors import BadRequest, Conflict, NotFound, TooLarge
from app.services.benchmarks import create_benchmark
from app.services.files import NewFile, add_file, delete_file, get_file, list_files, store_checked
from app.services.storage import Storage
from tests.factories import make_base_model, make_file, make_job, make_project

ROWS = '{"text": "a"}\n{"text": "b"}\n'
ITEMS = '{"id": "1", "question": "q", "choices": ["a", "b", "c", "d"], "answer": 0}\n'


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path / "storage"))


def local(tmp_path: Path, text: str, purpose: str = "fine-tune") -> NewFile:
    path = tmp_path / "upload"
    path.write_text(text)
    return NewFile(path, "name.jsonl", purpose)


def keep(session: Session, storage: Storage, project_id, new: NewFile) -> File:
    with store_checked(storage, new, max_bytes=10_000) as checked:
        return add_file(session, project_id, checked)


def fail_after_adding(session: Session, storage: Storage, new: NewFile) -> None:
    with store_checked(storage, new, max_bytes=10_000) as checked:
        add_file(session, None, checked)
        raise ZeroDivisionError


def test_what_the_check_found_is_kept(session: Session, storage: Storage, tmp_path: Path) -> None:
    project = make_project(session)
    rows = keep(session, storage, project.id, local(tmp_path, ROWS))
    assert rows.report is not None
    assert (rows.report["format"], rows.report["num_rows"]) == ("text", 2)
    assert storage.read_bytes(rows.path) == ROWS.encode()
    items = keep(session, storage, project.id, local(tmp_path, ITEMS, "evals"))
    assert items.report is not None
    assert (items.report["format"], items.report["chance_level"]) == ("multiple_choice", 0.25)


@pytest.mark.parametrize(
    ("text", "scorer"),
    [
        (ITEMS, "multiple_choice"),
        ('{"id": "1", "question": "q", "answer": "a"}\n', "exact_match"),
        ('{"id": "1", "text": "t"}\n', "nll"),
    ],
)
def test_the_scorer_of_a_benchmark_file_is_found(
    session: Session, storage: Storage, tmp_path: Path, text: str, scorer: str
) -> None:
    file = keep(session, storage, make_project(session).id, local(tmp_path, text, "evals"))
    assert file.report is not None
    assert file.report["scorer"] == scorer


@pytest.mark.parametrize("what", ["bad line", "too large", "no row", "failing transaction"])
def test_whatever_fails_nothing_stays_in_the_store(
    session: Session, storage: Storage, tmp_path: Path, what: str
) -> None:
    if what == "bad line":
        with pytest.raises(BadRequest, match="line 1"):
            keep(session, storage, None, local(tmp_path, "{}\n"))
    elif what == "too large":
        with pytest.raises(TooLarge), store_checked(storage, local(tmp_path, ROWS), max_bytes=5):
            pass
    elif what == "no row":
        with store_checked(storage, local(tmp_path, ROWS), max_bytes=100):
            assert len(storage.list_names("files")) == 1
    else:
        with pytest.raises(ZeroDivisionError):
            fail_after_adding(session, storage, local(tmp_path, ROWS))
    assert storage.list_names("files") == []


def test_a_file_in_use_is_not_deleted(
    session_factory: SessionFactory, session: Session, storage: Storage, tmp_path: Path
) -> None:
    project = make_project(session)
    items = keep(session, storage, project.id, local(tmp_path, ITEMS, "evals"))
    body = CreateBenchmark.model_validate(
        {"name": "b", "file": public_id("file", items.id), "scorer": "multiple_choice"}
    )
    _, version = create_benchmark(session, project.id, body)
    assert (version.version, version.num_items, version.chance) == (1, 1, 0.25)
    assert create_benchmark(session, project.id, body)[1].version == 2
    rows = keep(session, storage, project.id, local(tmp_path, ROWS))
    job = make_job(session, project, training_file_id=rows.id)
    session.commit()
    for file in (items, rows):
        with pytest.raises(Conflict) as refused:
            delete_file(session_factory, storage, project.id, file.id)
        assert refused.value.code == "file_in_use"
        assert storage.exists(file.path)
    job.move_to(JobState.CANCELLED)
    job.finished_at = job.created_at
    session.commit()
    delete_file(session_factory, storage, project.id, rows.id)
    assert not storage.exists(rows.path)
    with transaction(session_factory) as other, pytest.raises(NotFound):
        get_file(other, project.id, rows.id)


def test_general_data_of_a_base_model_stays(
    session_factory: SessionFactory, session: Session, storage: Storage
) -> None:
    project = make_project(session)
    file = make_file(session, project)
    make_base_model(session, general_file_id=file.id)
    session.commit()
    with pytest.raises(Conflict, match="general data"):
        delete_file(session_factory, storage, project.id, file.id)


def test_pages_hold_each_file_once_and_expired_ones_are_gone(session: Session) -> None:
    project = make_project(session)
    made = [make_file(session, project) for _ in range(5)]
    gone = make_file(session, project)
    session.refresh(gone)
    gone.expires_at = gone.created_at
    session.flush()
    first, more = list_files(session, project.id, limit=3)
    rest, end = list_files(session, project.id, after=first[-1].id, limit=3)
    assert ([f.id for f in first + rest], more, end) == ([f.id for f in made[::-1]], True, False)
    upward, _ = list_files(session, project.id, is_newest_first=False, after=made[0].id)
    assert [f.id for f in upward] == [f.id for f in made[1:]]
    with pytest.raises(NotFound):
        get_file(session, project.id, gone.id)
    with pytest.raises(NotFound):
        list_files(session, make_project(session).id, after=made[0].id)
