"""The store, on local disk and on an object store's interface."""

import hashlib
from pathlib import Path
from uuid import uuid4

import pytest

from app.domain.digests import directory_sha256
from app.errors import NotFound
from app.services.storage import Storage, StorageDamaged


@pytest.fixture(params=["local", "memory"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "local":
        return Storage(str(tmp_path / "store"))
    return Storage(f"memory://{uuid4().hex}")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    (directory / "sub").mkdir(parents=True)
    (directory / "config.json").write_text("{}")
    (directory / "sub" / "weights").write_bytes(bytes(range(256)) * 1000)
    return directory


def test_a_file_comes_back_as_it_went_in(storage: Storage, tmp_path: Path) -> None:
    source = tmp_path / "rows.jsonl"
    source.write_bytes(b"one\ntwo\n" * 200_000)
    stored = storage.put_file(source, "files/a")
    assert stored == ("files/a", 1_600_000, hashlib.sha256(source.read_bytes()).hexdigest())
    target = tmp_path / "out" / "rows"
    storage.get_file("files/a", target, sha256=stored.sha256)
    assert target.read_bytes() == source.read_bytes()
    assert b"".join(storage.iter_chunks("files/a")) == source.read_bytes()
    assert storage.put_bytes(b"small", "files/b").size_bytes == 5
    assert storage.read_bytes("files/b") == b"small"
    assert storage.list_names("files") == ["a", "b"]


def test_a_directory_comes_back_as_it_went_in(
    storage: Storage, model: Path, tmp_path: Path
) -> None:
    stored = storage.put_directory(model, "models/base/x")
    assert stored.sha256 == directory_sha256(model)
    assert stored.size_bytes == 256_002
    storage.get_directory("models/base/x", tmp_path / "out", sha256=stored.sha256)
    assert directory_sha256(tmp_path / "out") == stored.sha256


def test_names_are_part_of_a_directorys_digest(model: Path) -> None:
    before = directory_sha256(model)
    (model / "config.json").rename(model / "other.json")
    assert directory_sha256(model) != before


def test_damage_is_found_and_nothing_is_left_behind(
    storage: Storage, model: Path, tmp_path: Path
) -> None:
    stored = storage.put_directory(model, "m")
    storage.put_bytes(b"{ }", "m/config.json")
    with pytest.raises(StorageDamaged):
        storage.get_directory("m", tmp_path / "out", sha256=stored.sha256)
    with pytest.raises(StorageDamaged):
        storage.get_file("m/config.json", tmp_path / "file", sha256="0" * 64)
    assert sorted(path.name for path in tmp_path.iterdir()) in (["model"], ["model", "store"])


def test_what_is_missing_is_said(storage: Storage, tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        storage.get_file("files/none", tmp_path / "x")
    with pytest.raises(NotFound):
        storage.read_bytes("files/none")
    storage.delete("files/none")
    assert storage.list_names("files") == []


def test_deleting_leaves_fetched_copies_alone(
    storage: Storage, model: Path, tmp_path: Path
) -> None:
    storage.put_directory(model, "m")
    storage.get_directory("m", tmp_path / "out")
    storage.delete("m")
    assert not storage.exists("m")
    assert directory_sha256(tmp_path / "out") == directory_sha256(model)


def test_a_failed_write_leaves_what_was_there(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path / "store"))
    storage.put_bytes(b"old", "files/a")
    with pytest.raises(FileNotFoundError):
        storage.put_file(tmp_path / "none", "files/a")
    assert storage.read_bytes("files/a") == b"old"
    assert [path.name for path in (tmp_path / "store" / "files").iterdir()] == ["a"]


@pytest.mark.parametrize("path", ["", "/etc/passwd", "../x", "a/../../x"])
def test_no_path_leaves_the_root(path: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not a path under"):
        Storage(str(tmp_path)).read_bytes(path)
