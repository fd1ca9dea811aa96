"""The benchmark object and its versions."""

from typing import Any, Literal

from app.api.schemas.base import Identified, Schema, unix
from app.db.models import Benchmark, BenchmarkVersion
from app.domain.benchmarks import Subjects
from app.domain.identifiers import public_id


class SubsetObject(Schema):
    """How a version's items were drawn from a larger file."""

    limit: int
    seed: int
    of_items: int
    of_sha256: str


class VersionBody(Identified):
    """What is the same of a benchmark as its newest version and of a version by itself."""

    created_at: int
    name: str
    version: int
    kind: str
    scorer: str
    file: str | None
    items_sha256: str
    num_items: int
    chance: float
    source: str | None
    subset: SubsetObject | None
    subjects: dict[str, int] | None


class BenchmarkObject(VersionBody):
    """A benchmark with one of its versions; `items_sha256` is the suite hash of posted results."""

    object: Literal["benchmark"] = "benchmark"
    version_id: str
    owned_by: str


class BenchmarkVersionObject(VersionBody):
    """One version of a benchmark."""

    object: Literal["benchmark.version"] = "benchmark.version"


def show_benchmark(benchmark: Benchmark, version: BenchmarkVersion) -> BenchmarkObject:
    """A benchmark as clients see it."""
    is_own = benchmark.project_id is not None
    return BenchmarkObject(
        **_shared_fields(benchmark.name, version, is_own=is_own),
        id=public_id("benchmark", benchmark.id),
        version_id=public_id("benchmark_version", version.id),
        owned_by=(
            "retain" if benchmark.project_id is None else public_id("project", benchmark.project_id)
        ),
    )


def show_version(name: str, version: BenchmarkVersion, *, is_own: bool) -> BenchmarkVersionObject:
    """A benchmark version as clients see it; the operator's files are not theirs to read."""
    return BenchmarkVersionObject(
        **_shared_fields(name, version, is_own=is_own),
        id=public_id("benchmark_version", version.id),
    )


def _shared_fields(name: str, version: BenchmarkVersion, *, is_own: bool) -> dict[str, Any]:
    """The fields of `VersionBody` but its id."""
    subset, subjects = version.subset, version.subjects
    return {
        "created_at": unix(version.created_at),
        "name": name,
        "version": version.version,
        "kind": version.kind.value,
        "scorer": version.scorer.value,
        "file": public_id("file", version.file_id) if is_own else None,
        "items_sha256": version.items_sha256,
        "num_items": version.num_items,
        "chance": version.chance,
        "source": version.source,
        "subset": None if subset is None else SubsetObject.model_validate(subset),
        "subjects": None if subjects is None else Subjects.model_validate(subjects).counts(),
    }
