"""Tables, grouped by aggregate; importing this package registers them all."""

from app.db.models.audit import AuditEntry
from app.db.models.catalog import (
    BaseModel,
    Benchmark,
    BenchmarkVersion,
    RequiredBenchmark,
    SuiteEntry,
)
from app.db.models.delivery import IdempotencyKey, OutboxMessage, Worker
from app.db.models.deployment import Alias, AliasChange, RegisteredModel, RegisteredVersion
from app.db.models.files import File
from app.db.models.history import Checkpoint, DecisionRow, Evaluation
from app.db.models.jobs import Job, JobEvent, JobOrder
from app.db.models.measured import MeasuredRun
from app.db.models.monitors import Compensation, Monitor, MonitorLook
from app.db.models.projects import ApiKey, Project
from app.db.models.registry import ModelVersion
from app.db.models.uploads import Upload, UploadPart
from app.db.models.webhooks import WebhookDelivery, WebhookEndpoint, WebhookEvent

__all__ = [
    "Alias",
    "AliasChange",
    "ApiKey",
    "AuditEntry",
    "BaseModel",
    "Benchmark",
    "BenchmarkVersion",
    "Checkpoint",
    "Compensation",
    "DecisionRow",
    "Evaluation",
    "File",
    "IdempotencyKey",
    "Job",
    "JobEvent",
    "JobOrder",
    "MeasuredRun",
    "ModelVersion",
    "Monitor",
    "MonitorLook",
    "OutboxMessage",
    "Project",
    "RegisteredModel",
    "RegisteredVersion",
    "RequiredBenchmark",
    "SuiteEntry",
    "Upload",
    "UploadPart",
    "WebhookDelivery",
    "WebhookEndpoint",
    "WebhookEvent",
    "Worker",
]
