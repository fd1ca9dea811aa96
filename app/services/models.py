"""Base models: checked, hashed, copied into the store, and registered with their suite and general data."""

import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final
from uuid import uuid4

from pydantic import BaseModel as Schema
from pydantic import Field, ValidationError

from app.db.models import BaseModel, BenchmarkVersion, File
from app.db.repositories.catalog import CatalogRepository
from app.db.session import SessionFactory, transaction
from app.domain.benchmarks import BenchmarkKind, Scorer
from app.domain.identifiers import public_id
from app.domain.requests import CreateBenchmark
from app.errors import BadRequest, Conflict
from app.services.benchmarks import create_benchmark
from app.services.files import EVALS, FINE_TUNE, NewFile, check_contents, register_file
from app.services.model_files import copy_files, open_source, read_facts
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
    with transaction(factory) as session:
        _check_name(CatalogRepository(session), name)
        for benchmark in benchmarks or {}:
            CatalogRepository(session).get_benchmark(benchmark)
    storage = Storage(settings.storage_root)
    if general_data is not None:
        _require_file(general_data)
        check_contents(general_data, FINE_TUNE)
    general: File | None = None
    path = f"models/base/{uuid4().hex}"
    token = settings.hf_token.get_secret_value() if settings.hf_token else None
    try:
        with (
            open_source(
                source, revision=revision, token=token, scratch=settings.scratch_root
            ) as found,
            TemporaryDirectory(dir=_scratch(settings)) as scratch,
        ):
            facts = asdict(read_facts(found))
            copy_files(found, Path(scratch) / "model")
            stored = storage.put_directory(Path(scratch) / "model", path)
        model = BaseModel(
            name=name,
            source=found.source,
            revision=found.revision,
            sha256=stored.sha256,
            path=stored.path,
            size_bytes=stored.size_bytes,
            has_chat_template=facts.pop("has_chat_template"),
            details=facts,
        )
        with transaction(factory) as session:
            if general_data is not None:  # first: no statement has begun the transaction yet
                new = NewFile(general_data, general_data.name, FINE_TUNE)
                general = register_file(session, storage, None, new)
                model.general_file_id = general.id
            catalog = CatalogRepository(session)
            _check_name(catalog, name)
            suite = [
                (catalog.get_benchmark(benchmark), weight)
                for benchmark, weight in (benchmarks or {}).items()
            ]
            catalog.add_model(model, suite)
    except BaseException:
        storage.delete(path)
        if general is not None:
            storage.delete(general.path)
        raise
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
    _require_file(file)
    storage = Storage(settings.storage_root)
    row: File | None = None
    try:
        with transaction(factory) as session:
            row = register_file(session, storage, None, NewFile(file, file.name, EVALS))
            known = CatalogRepository(session).find_version(
                name, row.sha256, kind=kind, scorer=scorer
            )
            if known is not None:
                session.delete(row)
                storage.delete(row.path)
                return known
            body = CreateBenchmark(
                name=name, file=public_id("file", row.id), kind=kind, scorer=scorer
            )
            return create_benchmark(session, None, body).version
    except BaseException:
        if row is not None:
            storage.delete(row.path)
        raise


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


def _scratch(settings: Settings) -> Path:
    settings.scratch_root.mkdir(parents=True, exist_ok=True)
    return settings.scratch_root
