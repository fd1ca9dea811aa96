"""Registering base models: from directories, from a hub over real HTTP, and never half."""

import hashlib
import json
import os
import pickle
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from app.db.models import BaseModel, File, SuiteEntry
from app.db.session import SessionFactory, transaction
from app.domain.benchmarks import BenchmarkKind, Scorer
from app.errors import BadRequest, Conflict
from app.services.models import add_demo, add_model, add_operator_benchmark, list_models
from app.services.storage import Storage
from app.settings import Settings

COMMIT = "ab" * 20
CONFIG = {"architectures": ["TinyForCausalLM"], "max_position_embeddings": 128, "vocab_size": 50}


def safetensors(shapes: dict[str, list[int]]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (rows, columns) in shapes.items():
        size = rows * columns * 4
        header[name] = {
            "dtype": "F32",
            "shape": [rows, columns],
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(offset)


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    directory = tmp_path / "tiny"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(CONFIG))
    (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ x }}"}))
    (directory / "model.safetensors").write_bytes(safetensors({"a": [50, 8], "b": [8, 8]}))
    (directory / "README.md").write_text("not taken")
    return directory


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "general.jsonl"
    path.write_text('{"text": "a fact"}\n{"text": "another"}\n')
    return path


@pytest.fixture
def items(tmp_path: Path) -> Path:
    path = tmp_path / "items.jsonl"
    item = {"question": "?", "choices": ["a", "b"], "answer": 0}
    path.write_text("".join(json.dumps(item | {"id": f"i{n}"}) + "\n" for n in range(4)))
    return path


def stored_files(settings: Settings) -> list[str]:
    root = Path(settings.storage_root)
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())


def test_a_directory_is_copied_hashed_and_described(
    session_factory: SessionFactory, settings: Settings, model_dir: Path, rows: Path, items: Path
) -> None:
    version = add_operator_benchmark(
        session_factory,
        settings,
        name="arc",
        file=items,
        kind=BenchmarkKind.GENERAL,
        scorer=Scorer.MULTIPLE_CHOICE,
    )
    assert (version.version, version.num_items, version.chance) == (1, 4, 0.5)
    model = add_model(
        session_factory,
        settings,
        name="org/tiny",
        source=str(model_dir),
        benchmarks={"arc": 2.0},
        general_data=rows,
    )
    assert model.details == {
        "kind": "causal_lm",
        "architecture": "TinyForCausalLM",
        "num_parameters": 50 * 8 + 64,
        "shape": None,
        "context_length": 128,
        "vocab_size": 50,
        "dtype": "F32",
    }
    assert (model.has_chat_template, model.revision) == (True, None)
    taken = ["config.json", "model.safetensors", "tokenizer_config.json"]
    assert Storage(settings.storage_root).list_names(model.path) == taken
    lines = [
        f"{name}\0{hashlib.sha256((model_dir / name).read_bytes()).hexdigest()}\n" for name in taken
    ]
    assert model.sha256 == hashlib.sha256("".join(lines).encode()).hexdigest()
    with transaction(session_factory) as session:
        suite = session.scalars(select(SuiteEntry)).one()
        assert (suite.benchmark_version_id, suite.weight) == (version.id, 2.0)
        general = session.get_one(File, model.general_file_id)
        assert (general.project_id, general.filename) == (None, "general.jsonl")
        assert general.report is not None
        assert general.report["num_rows"] == 2
    assert [row.name for row in list_models(session_factory)] == ["org/tiny"]


def test_the_same_items_are_no_new_version_and_others_are(
    session_factory: SessionFactory, settings: Settings, items: Path
) -> None:
    def add() -> int:
        return add_operator_benchmark(
            session_factory,
            settings,
            name="arc",
            file=items,
            kind=BenchmarkKind.GENERAL,
            scorer=Scorer.MULTIPLE_CHOICE,
        ).version

    assert (add(), add()) == (1, 1)
    items.write_text(items.read_text().replace('"?"', '"!"'))
    assert add() == 2
    assert len(stored_files(settings)) == 2


def spoil(directory: Path, what: str) -> None:
    weights = directory / "model.safetensors"
    config = directory / "config.json"
    match what:
        case "pickle":
            (directory / "pytorch_model.bin").write_bytes(pickle.dumps({}))
        case "pickle_alone":
            weights.rename(directory / "pytorch_model.bin")
        case "code":
            (directory / "modeling_tiny.py").write_text("print()")
        case "auto_map":
            config.write_text(json.dumps(CONFIG | {"auto_map": {"AutoModel": "x.Y"}}))
        case "no_config":
            config.unlink()
        case "config_is_a_list":
            config.write_text("[]")
        case "cut_off":
            weights.write_bytes(weights.read_bytes()[:-1])
        case "no_safetensors":
            weights.write_bytes(b"PK\3\4" * 100)
        case "missing_shard":
            index = {"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}
            (directory / "model.safetensors.index.json").write_text(json.dumps(index))
        case _:
            raise ValueError(what)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("pickle", r"pytorch_model\.bin: pickled"),
        ("pickle_alone", r"no \*\.safetensors file but pytorch_model\.bin"),
        ("code", r"modeling_tiny\.py"),
        ("auto_map", "auto_map"),
        ("no_config", r"config\.json is missing"),
        ("config_is_a_list", "not a JSON object"),
        ("cut_off", "cut off"),
        ("no_safetensors", "not a safetensors file"),
        ("missing_shard", r"model-2\.safetensors, which is missing"),
    ],
)
def test_what_cannot_be_loaded_safely_is_refused_and_leaves_nothing(
    session_factory: SessionFactory, settings: Settings, model_dir: Path, what: str, message: str
) -> None:
    spoil(model_dir, what)
    with pytest.raises(BadRequest, match=message):
        add_model(session_factory, settings, name="tiny", source=str(model_dir))
    assert stored_files(settings) == []
    assert list_models(session_factory) == []
    assert list(settings.scratch_root.rglob("*")) == []


@pytest.mark.parametrize("name", ["", "a:b", "a@b", "/a", "a/", "a//b", "-a", "x" * 129, "a b"])
def test_names_that_would_not_read_well_in_others_are_refused(
    session_factory: SessionFactory, settings: Settings, model_dir: Path, name: str
) -> None:
    with pytest.raises(BadRequest, match="name"):
        add_model(session_factory, settings, name=name, source=str(model_dir))


def test_a_taken_name_an_unknown_benchmark_or_bad_rows_leave_nothing(
    session_factory: SessionFactory, settings: Settings, model_dir: Path, rows: Path
) -> None:
    add_model(session_factory, settings, name="tiny", source=str(model_dir))
    before = stored_files(settings)
    with pytest.raises(Conflict):
        add_model(session_factory, settings, name="tiny", source=str(model_dir))
    with pytest.raises(BadRequest, match="No benchmark is called 'none'"):
        add_model(
            session_factory, settings, name="b", source=str(model_dir), benchmarks={"none": 1.0}
        )
    rows.write_text('{"text": 1}\n')
    with pytest.raises(BadRequest, match="line 1"):
        add_model(session_factory, settings, name="b", source=str(model_dir), general_data=rows)
    assert stored_files(settings) == before


@pytest.mark.parametrize("source", ["./none", "/none", "a/b/c", "a b"])
def test_a_source_that_is_nothing_is_refused(
    session_factory: SessionFactory, settings: Settings, source: str
) -> None:
    with pytest.raises(BadRequest, match="neither a directory nor"):
        add_model(session_factory, settings, name="tiny", source=source)


def test_a_directory_has_no_revision(
    session_factory: SessionFactory, settings: Settings, model_dir: Path
) -> None:
    with pytest.raises(BadRequest, match="revision"):
        add_model(session_factory, settings, name="t", source=str(model_dir), revision="main")


def test_the_demos_directory_is_registered_by_its_own_description(
    session_factory: SessionFactory, settings: Settings, model_dir: Path, rows: Path, items: Path
) -> None:
    directory = model_dir.parent
    benchmarks = [
        {"name": "demo-mc", "file": items.name, "kind": "general", "scorer": "multiple_choice"},
        {"name": "demo-domain", "file": items.name, "kind": "domain", "scorer": "multiple_choice"},
    ]
    described = {"model": "tiny", "general_data": rows.name, "benchmarks": benchmarks, "seed": 0}
    (directory / "demo.json").write_text(json.dumps(described))
    model = add_demo(session_factory, settings, name="demo", directory=directory)
    assert model.general_file_id is not None
    with transaction(session_factory) as session:
        assert len(session.scalars(select(SuiteEntry)).all()) == 1
    (directory / "demo.json").write_text('{"model": "tiny"}')
    with pytest.raises(BadRequest, match="general_data"):
        add_demo(session_factory, settings, name="demo2", directory=directory)


class Hub(BaseHTTPRequestHandler):
    """The few endpoints of a model hub that registering needs; the model is gated."""

    directory: Path
    paths: list[str]

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self, *, with_body: bool) -> None:
        type(self).paths.append(self.path)
        names = [path.name for path in self.directory.iterdir()] + ["pytorch_model.bin"]
        if self.headers.get("Authorization") != "Bearer hub-token":
            self._send(401, b"{}", {"X-Error-Code": "GatedRepo"}, with_body=with_body)
        elif self.path.startswith("/api/models/org/tiny/revision/"):
            known = self.path.rsplit("/", 1)[1].split("?")[0] in ("main", COMMIT)
            siblings = [{"rfilename": name} for name in [*names, "onnx/model.onnx"]]
            body = json.dumps({"id": "org/tiny", "sha": COMMIT, "siblings": siblings}).encode()
            error = {} if known else {"X-Error-Code": "RevisionNotFound"}
            self._send(200 if known else 404, body, error, with_body=with_body)
        elif self.path.startswith(f"/org/tiny/resolve/{COMMIT}/"):
            body = (self.directory / self.path.rsplit("/", 1)[1]).read_bytes()
            etag = hashlib.sha256(body).hexdigest()
            headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{etag}"'}
            self._send(200, body, headers, with_body=with_body)
        else:
            self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"}, with_body=with_body)

    def _send(self, status: int, body: bytes, headers: dict[str, str], *, with_body: bool) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if with_body:
            self.wfile.write(body)


@pytest.fixture
def hub(model_dir: Path) -> Iterator[str]:
    Hub.directory, Hub.paths = model_dir, []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


ADD = """
import sys
from app.db.session import build_engine, build_session_factory
from app.errors import RetainError
from app.services.models import add_model
from app.settings import load_settings
settings = load_settings()
factory = build_session_factory(build_engine(settings.database_url))
try:
    model = add_model(factory, settings, name="tiny", source=sys.argv[1], revision=sys.argv[2] or None)
    print(model.revision, model.source)
except RetainError as error:
    sys.exit(f"{type(error).__name__}: {error}")
"""


def add_from(
    hub: str,
    database: str,
    settings: Settings,
    *,
    token: str = "hub-token",
    source: str = "org/tiny",
    revision: str = "main",
) -> subprocess.CompletedProcess[str]:
    """In a process of its own, since the hub's address is read when its library is imported."""
    environment = os.environ | {
        "HF_ENDPOINT": hub,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HOME": str(settings.data_dir / "hf"),
        "RETAIN_DATA_DIR": str(settings.data_dir),
        "RETAIN_DATABASE_URL": database,
        "RETAIN_HF_TOKEN": token,
    }
    return subprocess.run(
        [sys.executable, "-c", ADD, source, revision],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_a_gated_hub_id_is_pinned_to_its_commit_and_read_through_a_mirror(
    hub: str, database: str, committed_factory: SessionFactory, settings: Settings
) -> None:
    done = add_from(hub, database, settings)
    assert done.stdout.split() == [COMMIT, "org/tiny"], done.stderr
    assert not any(
        "pytorch_model" in path or "onnx" in path for path in Hub.paths if "resolve" in path
    )
    with transaction(committed_factory) as session:
        model = session.scalars(select(BaseModel)).one()
    names = Storage(settings.storage_root).list_names(model.path)
    assert names == ["config.json", "model.safetensors", "tokenizer_config.json"]
    assert list(settings.scratch_root.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"token": "wrong"}, "gated: accept its terms"),
        ({"revision": "none"}, "no such revision"),
        ({"source": "org/none"}, "no hub model of this id"),
    ],
)
def test_what_the_hub_refuses_is_said_clearly(
    hub: str, database: str, settings: Settings, changes: dict[str, Any], message: str
) -> None:
    done = add_from(hub, database, settings, **changes)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("BadRequest: ")
    assert message in done.stderr
    assert stored_files(settings) == []


def test_a_hub_that_is_away_is_said_clearly(database: str, settings: Settings) -> None:
    done = add_from("http://127.0.0.1:9", database, settings)
    assert (
        done.stderr.strip()
        .splitlines()[-1]
        .startswith("Unavailable: The hub (http://127.0.0.1:9) does not deliver")
    )
