"""Base models: checked, hashed, copied into the store, and registered with their suite and general data."""

import re
from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final
from uuid import uuid4

from pydantic import BaseModel as Schema
from pydantic import Field, ValidationError

from app.db.models import BaseModel, BenchmarkVersion
from app.db.repositories.catalog import CatalogRepository
from app.db.session import SessionFactory, transaction
from app.domain.benchmarks import BenchmarkKind, Scorer
from app.domain.configs.base import CAUSAL_LM, ModelKind
from app.domain.identifiers import public_id
from app.domain.requests import CreateBenchmark
from app.errors import BadRequest, Conflict
from app.services.audit import sign
from app.services.benchmarks import create_benchmark
from app.services.files import EVALS, FINE_TUNE, CheckedFile, NewFile, add_file, store_checked
from app.services.model_files import check_kind, copy_files, open_source, read_facts
from app.services.storage import Storage
from app.settings import Settings

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,127}")


class DemoBenchmark(Schema):
    """A benchmark of the demo: a file beside `demo.json`."""

    name: str
    file: str
    kind: BenchmarkKind
    scorer: Scorer
    weight: float | None = Field(default=1.0, gt=0)  # None: not in the suite


class DemoManifest(Schema):
    """`demo.json`: what `python -m workers.demo_model OUT` made; paths are relative to OUT."""

    model: str
    general_data: str
    benchmarks: tuple[DemoBenchmark, ...]


@dataclass(frozen=True, slots=True)
class NewModel:
    """What an operator hands in."""

    name: str
    source: str
    revision: str | None
    kind: ModelKind
    benchmarks: Mapping[str, float] = field(default_factory=dict)
    general_data: Path | None = None


def add_model(
    factory: SessionFactory,
    settings: Settings,
    *,
    name: str,
    source: str,
    revision: str | None = None,
    benchmarks: Mapping[str, float] | None = None,
    general_data: Path | None = None,
) -> BaseModel:
    """Registers a directory or a hub id under a name; its files are copied, the source is free afterwards.

    Args:
        factory: Opens short transactions; none is open while files are copied.
        settings: Where the store is, and the hub's token.
        name: What jobs will call it.
        source: A directory, or a hub id.
        revision: Of the hub id; it is pinned to the commit this means now.
        benchmarks: Names of the suite with their weights.
        general_data: A file of training rows that stands for what the model must not forget.

    Raises:
        BadRequest: The name, a benchmark, the rows or the model's files cannot be taken.
        Conflict: The name is taken.
        Unavailable: The hub cannot be reached.
    """
    new = NewModel(name, source, revision, CAUSAL_LM, benchmarks or {}, general_data)
    return _register(factory, settings, new)


def add_other_model(
    factory: SessionFactory,
    settings: Settings,
    *,
    name: str,
    source: str,
    revision: str | None = None,
    kind: ModelKind,
) -> BaseModel:
    """Registers a model that jobs do not train, for strategies that name it; else as `add_model`.

    Raises:
        BadRequest: The name or the files cannot be taken, or they are of another kind.
        Conflict: The name is taken.
        Unavailable: The hub cannot be reached.
    """
    return _register(factory, settings, NewModel(name, source, revision, kind))


def _register(factory: SessionFactory, settings: Settings, new: NewModel) -> BaseModel:
    with transaction(factory) as session:
        _check_name(CatalogRepository(session), new.name)
        for benchmark in new.benchmarks:
            CatalogRepository(session).get_benchmark(benchmark)
    storage = Storage(settings.storage_root)
    path = f"models/base/{uuid4().hex}"
    token = settings.hf_token.get_secret_value() if settings.hf_token else None
    settings.scratch_root.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        general = (
            None
            if new.general_data is None
            else stack.enter_context(_stored(storage, settings, new.general_data, FINE_TUNE))
        )
        # Deleted on any failure, and kept by `pop_all` once the row is committed.
        undo = stack.enter_context(ExitStack())
        undo.callback(storage.delete, path)
        with (
            open_source(
                new.source, revision=new.revision, token=token, scratch=settings.scratch_root
            ) as found,
            TemporaryDirectory(dir=settings.scratch_root) as scratch,
        ):
            check_kind(found, new.kind)
            facts = asdict(read_facts(found)) | {"kind": new.kind}
            copy_files(found, Path(scratch) / "model")
            stored = storage.put_directory(Path(scratch) / "model", path)
        model = BaseModel(
            name=new.name,
            source=found.source,
            revision=found.revision,
            sha256=stored.sha256,
            path=stored.path,
            size_bytes=stored.size_bytes,
            has_chat_template=facts.pop("has_chat_template"),
            details=facts,
        )
        with transaction(factory) as session:
            catalog = CatalogRepository(session)
            _check_name(catalog, new.name)
            if general is not None:
                model.general_file_id = add_file(session, None, general).id
            suite = [
                (catalog.get_benchmark(benchmark), weight)
                for benchmark, weight in new.benchmarks.items()
            ]
            catalog.add_model(model, suite)
            sign(session, new.name)
        undo.pop_all()
    return model


def add_demo(
    factory: SessionFactory, settings: Settings, *, name: str, directory: Path
) -> BaseModel:
    """Registers what the demo's builder left in a directory: benchmarks, general data and the model.

    Raises:
        BadRequest: The directory does not hold what its `demo.json` says.
        Conflict: The name is taken.
    """
    manifest = _read_manifest(directory)
    require_free_name(factory, name)
    for benchmark in manifest.benchmarks:
        add_operator_benchmark(
            factory,
            settings,
            name=benchmark.name,
            file=directory / benchmark.file,
            kind=benchmark.kind,
            scorer=benchmark.scorer,
        )
    suite = {
        benchmark.name: benchmark.weight
        for benchmark in manifest.benchmarks
        if benchmark.weight is not None and benchmark.kind is BenchmarkKind.GENERAL
    }
    return add_model(
        factory,
        settings,
        name=name,
        source=str(directory / manifest.model),
        benchmarks=suite,
        general_data=directory / manifest.general_data,
    )


def add_operator_benchmark(
    factory: SessionFactory,
    settings: Settings,
    *,
    name: str,
    file: Path,
    kind: BenchmarkKind,
    scorer: Scorer,
) -> BenchmarkVersion:
    """Registers the next version of a benchmark that every project can name; the same file is no new version.

    Raises:
        BadRequest: The file is missing, or a line of it cannot be read.
    """
    storage = Storage(settings.storage_root)
    with (
        _stored(storage, settings, file, EVALS) as checked,
        transaction(factory) as session,
    ):
        known = CatalogRepository(session).find_version(
            name, checked.stored.sha256, kind=kind, scorer=scorer
        )
        if known is not None:
            return known
        row = add_file(session, None, checked)
        body = CreateBenchmark(name=name, file=public_id("file", row.id), kind=kind, scorer=scorer)
        _, version = create_benchmark(session, None, body)
        sign(session, name)
        return version


def require_free_name(factory: SessionFactory, name: str) -> None:
    """Refuses a name before the work that would end in refusing it.

    Raises:
        BadRequest: It cannot be a model's name.
        Conflict: The name is taken.
    """
    with transaction(factory) as session:
        _check_name(CatalogRepository(session), name)


def list_models(factory: SessionFactory) -> list[BaseModel]:
    """Every base model, oldest first."""
    with transaction(factory) as session:
        return CatalogRepository(session).list_models()


def _check_name(catalog: CatalogRepository, name: str) -> None:
    # No ':' and '@': `ft:<base>:...` and `name@alias` must stay readable.
    if not _NAME.fullmatch(name) or "//" in name or name.endswith("/"):
        raise BadRequest(
            "A model's name has 1 to 128 letters, digits, '.', '_', '-' or '/', and begins with a letter"
            " or digit.",
            "name",
        )
    if catalog.find_model(name) is not None:
        raise Conflict(f"A base model is already called '{name}'.", "name")


def _read_manifest(directory: Path) -> DemoManifest:
    path = directory / "demo.json"
    _require_file(path)
    try:
        return DemoManifest.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise BadRequest(f"{path}: {where}: {first['msg']}") from None


def _require_file(path: Path) -> None:
    if not path.is_file():
        raise BadRequest(f"{path} is not a file.")


def _stored(
    storage: Storage, settings: Settings, path: Path, purpose: str
) -> AbstractContextManager[CheckedFile]:
    _require_file(path)
    # An operator's own file may be larger than what clients may upload.
    max_bytes = max(settings.max_upload_bytes, path.stat().st_size)
    return store_checked(storage, NewFile(path, path.name, purpose), max_bytes=max_bytes)
