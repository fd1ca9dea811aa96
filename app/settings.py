"""Settings: one frozen object, read once from `RETAIN_*` variables, passed on as an argument."""

from functools import cache
from pathlib import Path
from typing import Annotated

from pydantic import Field, SecretStr, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict


class Settings(BaseSettings):
    """Everything an operator can set; each field is `RETAIN_<NAME>`. Durations in seconds."""

    model_config = SettingsConfigDict(env_prefix="RETAIN_", frozen=True, extra="ignore")

    data_dir: Path = Path(".retain")
    database_url: str | None = None  # None: the embedded Postgres of the data directory
    redis_url: str | None = None  # None: the embedded Redis of the data directory
    storage_url: str | None = None  # fsspec root; None: <data_dir>/storage
    secret_key: SecretStr | None = (
        None  # Fernet key for webhook secrets; None: <data_dir>/secret.key
    )
    scratch_dir: Path | None = None  # None: <data_dir>/scratch

    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)
    api_processes: int = Field(default=1, ge=1, le=64)
    max_upload_bytes: int = Field(default=512 * 2**20, ge=1)
    max_resumable_bytes: int = Field(default=2 * 2**30, ge=1)  # of a file that comes in parts
    max_json_bytes: int = Field(default=2**20, ge=1)
    max_wait_seconds: float = Field(default=300, gt=0)  # of one long poll
    max_stream_seconds: float = Field(default=24 * 3600, gt=0)  # of one stream; its reader goes on
    stream_ping_seconds: float = Field(default=15, gt=0)  # proxies cut what is silent
    docs_enabled: bool = True
    requests_per_minute_per_key: int = Field(default=60_000, ge=0)  # 0: no limit
    requests_per_minute_per_project: int = Field(default=120_000, ge=0)  # 0: no limit
    key_cache_seconds: float = Field(default=3, ge=0, le=5)  # how long a revoked key may still work

    lease_ttl_seconds: float = Field(default=60, gt=0)
    beat_seconds: float = Field(default=15, gt=0)
    reap_seconds: float = Field(default=10, gt=0)
    poll_seconds: float = Field(default=15, gt=0)
    partition_grace_seconds: float = Field(default=600, gt=0)
    stall_seconds: float = Field(default=600, gt=0)  # a trainer silent for this long is killed
    stop_grace_seconds: float = Field(default=30, gt=0)
    max_crashes: int = Field(default=3, ge=1)
    # Quotas of a project that has none of its own (`retain projects set`); None: no limit.
    max_queued_jobs: int = Field(default=100, ge=1)
    max_running_jobs: int | None = Field(default=None, ge=1)
    max_storage_bytes: int | None = Field(default=None, ge=1)
    queues: Annotated[tuple[str, ...], NoDecode] = ("default",)  # RETAIN_QUEUES=a,b

    torch_threads: int | None = Field(default=None, ge=1)  # per trainer; None: chosen by model size
    worker_slots: int | None = Field(default=None, ge=1)  # None: one a GPU, else one CPU slot
    webhook_allow_private: bool = False
    webhook_schedule_scale: float = Field(default=1.0, gt=0)  # multiplies the retry gaps
    hf_token: SecretStr | None = None
    pg_dump: Path | None = None  # of backups; None: the embedded Postgres' own, else on PATH
    log_json: bool = False

    @field_validator("queues", mode="before")
    @classmethod
    def _split_at_commas(cls, value: object) -> object:
        if isinstance(value, str):
            return tuple(name.strip() for name in value.split(",") if name.strip())
        return value

    @property
    def storage_root(self) -> str:
        """Where files, checkpoints and model versions live."""
        return self.storage_url or str((self.data_dir / "storage").resolve())

    @property
    def scratch_root(self) -> Path:
        """Local disk for trainers."""
        return (self.scratch_dir or self.data_dir / "scratch").resolve()


@cache
def load_settings() -> Settings:
    """The process's settings."""
    return Settings()
