"""Backup and restore: a round trip under way, and everything that is no whole backup."""

import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from sqlalchemy import select, update

from app.db.models import AuditEntry, Checkpoint, File, Job, ModelVersion
from app.db.session import build_engine, build_session_factory, transaction
from app.domain.states import JobState
from app.embedded.backup import back_up
from app.embedded.dumps import DUMP, DumpFailed, find_program
from app.embedded.restore import restore
from app.errors import Conflict, RetainError
from app.services.engine import CrashRules
from app.services.keys import authenticate, create_key
from app.services.reaping import reap
from app.services.storage import Storage, StorageDamaged
from app.settings import Settings
from tests.app.cli.test_cli import retain
from tests.databases import create_database, drop_database
from tests.workers.test_supervisor import SCRIPT, World, eventually, world
from workers.supervisor import Node
from workers.supervisor.slots import Slot, Slots

__all__ = ["world"]


@pytest.fixture
def empty(template_url: str) -> Iterator[str]:
    """A database without a table."""
    url = create_database(template_url)
    yield url
    drop_database(url)


@pytest.fixture
def elsewhere(empty: str, world: World, tmp_path: Path) -> Settings:
    """The settings of another, empty installation."""
    return world.settings.model_copy(
        update={"data_dir": tmp_path / "elsewhere", "database_url": empty}
    )


def url_of(world: World) -> str:
    assert world.settings.database_url is not None
    return world.settings.database_url


def back_up_to(place: Path, world: World) -> Path:
    back_up(url_of(world), world.settings, str(place))
    return place


def stored(root: Path) -> list[str]:
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())


def test_a_running_job_is_backed_up_and_goes_on_elsewhere_from_its_checkpoint(
    world: World, elsewhere: Settings, empty: str, tmp_path: Path
):
    with transaction(world.factory) as session:
        job = session.get_one(Job, world.job_id)
        key = create_key(session, project_id=job.project_id, name="k").text
    place = tmp_path / "backup"
    with pacing(world):
        world.reaches(11)
        eventually(lambda: world.rows(Checkpoint), "a checkpoint")
        environment = {
            "RETAIN_DATABASE_URL": url_of(world),
            "RETAIN_DATA_DIR": str(world.settings.data_dir),
        }
        done = retain("backup", str(place), **environment)
        assert done.returncode == 0, done.stderr
    manifest = json.loads((place / "backup.json").read_text())["manifest"]
    kinds = [artifact["kind"] for artifact in manifest["artifacts"]]
    assert {"file", "directory", "checkpoint"} <= set(kinds)
    assert (place.stat().st_mode & 0o777, manifest["secret_sha256"]) == (0o700, None)

    environment = {"RETAIN_DATABASE_URL": empty, "RETAIN_DATA_DIR": str(elsewhere.data_dir)}
    done = retain("restore", str(place), **environment)
    assert done.returncode == 0, done.stderr
    again = retain("restore", str(place), **environment)
    assert (again.returncode, "not empty" in again.stderr) == (1, True)

    engine = build_engine(empty)
    other = World(
        build_session_factory(engine), elsewhere, Storage(elsewhere.storage_root), world.job_id
    )
    assert [row.route for row in other.rows(AuditEntry)] == ["retain backup", "retain restore"]
    with transaction(other.factory) as session:
        assert authenticate(session, key).project_id == job.project_id
    left = other.job()
    assert left.state is JobState.RUNNING  # as of then; its lease has run out or will
    with transaction(other.factory) as session:
        session.execute(update(Job).values(lease_expires_at="2020-01-01T00:00Z"))
    with transaction(other.factory) as session:
        reap(session, rules=CrashRules(3, elsewhere.lease_ttl_seconds))
        session.execute(update(Job).values(not_before="2020-01-01T00:00Z"))
    assert other.job().state is JobState.QUEUED
    shutil.rmtree(world.settings.data_dir)  # nothing of the first installation is needed
    ended = other.run("paced")
    assert (ended.state, ended.attempt) == (JobState.SUCCEEDED, left.attempt + 1), ended.error
    assert ended.run_plan is not None
    assert ended.run_plan["resume"]["step"] >= 10
    [version] = other.rows(ModelVersion)
    assert other.storage.exists(f"{version.path}/model.safetensors")
    engine.dispose()


class TestRefusals:
    @pytest.mark.slow  # of seconds together
    @pytest.mark.parametrize(
        "damage",
        ["no_manifest", "torn_manifest", "changed_manifest", "torn_dump", "no_file", "bit_flip"],
    )
    def test_what_is_not_a_whole_backup_is_refused_and_leaves_nothing(
        self, world: World, elsewhere: Settings, empty: str, tmp_path: Path, damage: str
    ):
        place = back_up_to(tmp_path / "backup", world)
        manifest = place / "backup.json"
        artifact = next(path for path in (place / "artifacts/files").rglob("*") if path.is_file())
        match damage:
            case "no_manifest":
                manifest.unlink()
            case "torn_manifest":
                manifest.write_bytes(manifest.read_bytes()[:-20])
            case "changed_manifest":
                text = manifest.read_text().replace('"files/', '"other/', 1)
                manifest.chmod(0o644)
                manifest.write_text(text)
            case "torn_dump":
                rewrite(place / "database.dump", (place / "database.dump").read_bytes()[:-100])
            case "no_file":
                artifact.unlink()
            case _:
                content = bytearray(artifact.read_bytes())
                content[0] ^= 1
                rewrite(artifact, bytes(content))
        with pytest.raises(RetainError) as refused:
            restore(empty, elsewhere, str(place))
        assert refused.value.code == "backup_damaged"
        root = Path(elsewhere.storage_root)
        assert not root.exists() or stored(root) == []
        if damage == "bit_flip":  # what was brought before it is gone, so a whole one fits
            restore(empty, elsewhere, str(back_up_to(tmp_path / "whole", world)))

    def test_a_place_that_holds_something_takes_no_backup(self, world: World, tmp_path: Path):
        (tmp_path / "notes").write_text("mine")
        with pytest.raises(Conflict, match="not empty"):
            back_up(url_of(world), world.settings, str(tmp_path))

    def test_a_missing_artifact_ends_the_backup_without_a_manifest(
        self, world: World, tmp_path: Path
    ):
        [file] = world.rows(File)
        world.storage.delete(file.path)
        with pytest.raises(StorageDamaged, match="it is not there"):
            back_up_to(tmp_path / "backup", world)
        assert not (tmp_path / "backup/backup.json").exists()

    def test_an_older_program_is_refused_with_its_version(self, tmp_path: Path):
        old = tmp_path / "pg_dump"
        old.write_text("#!/bin/sh\necho 'pg_dump (PostgreSQL) 15.18'\n")
        old.chmod(0o755)
        with pytest.raises(
            DumpFailed, match="of Postgres 15, the server is 18: set RETAIN_PG_DUMP"
        ):
            find_program(DUMP, server_major=18, given=old)
        assert find_program(DUMP, server_major=15, given=old).major == 15
        own = find_program(DUMP, server_major=18)
        said = subprocess.run([own.path, "--version"], capture_output=True, text=True, check=True)
        assert "18" in said.stdout


@pytest.mark.slow
def test_an_artifact_that_is_deleted_meanwhile_has_the_snapshot_taken_anew(
    world: World, elsewhere: Settings, empty: str, tmp_path: Path
):
    """The deletion falls between the snapshot and the copying: after the first dump has ended."""
    with transaction(world.factory) as session:
        session.execute(update(Job).values(training_file_id=None))
    [file] = world.rows(File)
    deletion = tmp_path / "delete.py"
    deletion.write_text(
        "import psycopg, pathlib\n"
        f"with psycopg.connect({url_of(world)!r}) as connection:\n"
        "    connection.execute('UPDATE files SET deleted_at = now()')\n"
        f"pathlib.Path({world.settings.storage_root!r}, {file.path!r}).unlink()\n"
    )
    own, runs = find_program(DUMP, server_major=18).path, tmp_path / "runs"
    program = tmp_path / "pg_dump"
    program.write_text(
        f"#!/bin/sh\n'{own}' \"$@\" || exit 1\n"
        f"case \"$*\" in *--snapshot*) echo run >> '{runs}' ;; *) exit 0 ;; esac\n"
        f"[ \"$(wc -l < '{runs}')\" -gt 1 ] || '{sys.executable}' '{deletion}'\n"
    )
    program.chmod(0o755)
    settings = world.settings.model_copy(update={"pg_dump": program})
    manifest = back_up(url_of(world), settings, str(tmp_path / "backup"))
    assert runs.read_text().split() == ["run", "run"]
    assert file.path not in {artifact.path for artifact in manifest.artifacts}
    restore(empty, elsewhere, str(tmp_path / "backup"))
    engine = build_engine(empty)
    with transaction(build_session_factory(engine)) as session:
        assert session.scalars(select(File.deleted_at)).one() is not None
    engine.dispose()


@pytest.mark.slow
def test_references_alone_are_checked_where_they_lie(
    world: World, elsewhere: Settings, empty: str, tmp_path: Path
):
    place = tmp_path / "backup"
    back_up(url_of(world), world.settings, str(place), copies=False)
    assert stored(place) == ["backup.json", "database.dump"]
    same = elsewhere.model_copy(update={"storage_url": world.settings.storage_root})
    with pytest.raises(RetainError, match="is missing or was changed"):
        restore(empty, elsewhere, str(place))
    restore(empty, same, str(place))


@pytest.mark.slow
def test_the_key_of_secrets_comes_with_a_backup_only_when_asked_for(
    world: World, elsewhere: Settings, empty: str, tmp_path: Path
):
    world.settings.data_dir.mkdir(exist_ok=True)
    (world.settings.data_dir / "secret.key").write_bytes(b"key")
    back_up(url_of(world), world.settings, str(tmp_path / "backup"), with_secret_key=True)
    restore(empty, elsewhere, str(tmp_path / "backup"))
    key = elsewhere.data_dir / "secret.key"
    assert (key.read_bytes(), key.stat().st_mode & 0o777) == (b"key", 0o600)


@contextmanager
def pacing(world: World) -> Iterator[None]:
    """A worker at work on the job, slowly enough to be backed up under way."""
    command = [sys.executable, str(SCRIPT), "paced", "--pace", "0.2"]
    node = Node(world.settings, Slots([Slot(0, None, None)], "cpu"), command=command)
    thread = threading.Thread(target=node.serve)
    thread.start()
    try:
        yield
    finally:
        node.drain()
        thread.join()
        node.stop()


def rewrite(path: Path, content: bytes) -> None:
    path.chmod(0o644)
    path.write_bytes(content)
