"""Base models, benchmarks with their versions, and the suites that tie them."""

from typing import Any
from uuid import UUID

from sqlalchemy import ForeignKey, UniqueConstraint, text
from sqlalchemy.orm import Mapped, mapped_column

from app.db.base import Base, Record, enum_column
from app.domain.benchmarks import BenchmarkKind, Scorer


class BaseModel(Record):
    """A model directory that an operator registered under a name; jobs name it, never a path."""

    __tablename__ = "base_models"

    name: Mapped[str] = mapped_column(unique=True)
    source: Mapped[str]  # the directory or hub id it came from
    revision: Mapped[str | None]  # 40 hex digits for a hub id
    sha256: Mapped[str]  # over the sorted (name, sha256) of all its files
    path: Mapped[str]  # under the storage root
    size_bytes: Mapped[int]
    details: Mapped[dict[str, Any]]  # kind, num_parameters, context_length, ...
    has_chat_template: Mapped[bool]
    general_file_id: Mapped[UUID | None] = mapped_column(ForeignKey("files.id"))


class Benchmark(Record):
    """A name for a line of versions; operator-owned when `project_id` is null."""

    __tablename__ = "benchmarks"
    __table_args__ = (UniqueConstraint("project_id", "name", postgresql_nulls_not_distinct=True),)

    project_id: Mapped[UUID | None] = mapped_column(ForeignKey("projects.id"))
    name: Mapped[str]


class BenchmarkVersion(Record):
    """A fixed list of scored items."""

    __tablename__ = "benchmark_versions"
    __table_args__ = (UniqueConstraint("benchmark_id", "version"),)

    benchmark_id: Mapped[UUID] = mapped_column(ForeignKey("benchmarks.id"))
    version: Mapped[int]  # 1, 2, ... within the benchmark
    kind: Mapped[BenchmarkKind] = mapped_column(enum_column(BenchmarkKind))
    scorer: Mapped[Scorer] = mapped_column(enum_column(Scorer))
    file_id: Mapped[UUID] = mapped_column(ForeignKey("files.id"))
    items_sha256: Mapped[str]  # the file's sha256: the suite hash of posted results
    num_items: Mapped[int]
    chance: Mapped[float]  # mean score of guessing; 0 for generation, ignored for nll
    source: Mapped[str | None]  # where the items come from, in their maker's words
    subset: Mapped[dict[str, Any] | None]  # of a drawn part: limit, seed, and the file it is of
    subjects: Mapped[dict[str, Any] | None] = mapped_column(deferred=True)  # a `Subjects`


class SuiteEntry(Base):
    """A benchmark version in a base model's suite."""

    __tablename__ = "suite_entries"

    base_model_id: Mapped[UUID] = mapped_column(ForeignKey("base_models.id"), primary_key=True)
    benchmark_version_id: Mapped[UUID] = mapped_column(
        ForeignKey("benchmark_versions.id"), primary_key=True
    )
    weight: Mapped[float] = mapped_column(server_default=text("1"))
    is_mandatory: Mapped[bool] = mapped_column(server_default=text("false"))


class RequiredBenchmark(Base):
    """A benchmark version that every job of a project is watched by, whatever it says itself."""

    __tablename__ = "required_benchmarks"

    project_id: Mapped[UUID] = mapped_column(ForeignKey("projects.id"), primary_key=True)
    benchmark_version_id: Mapped[UUID] = mapped_column(
        ForeignKey("benchmark_versions.id"), primary_key=True
    )
    weight: Mapped[float] = mapped_column(server_default=text("1"))
    limit: Mapped[float]  # relative drop, of nll nats per token, that no job's policy can loosen
