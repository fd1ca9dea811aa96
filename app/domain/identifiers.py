"""Public ids: a prefix that names the kind, then the row's uuid as 32 hex digits."""

import re
from typing import Final
from uuid import UUID

from app.errors import NotFound

PREFIXES: Final = {
    "project": "proj_",
    "file": "file-",
    "upload": "upload_",
    "upload_part": "part_",
    "job": "ftjob-",
    "event": "ftevent-",
    "checkpoint": "ftckpt_",
    "benchmark": "bench_",
    "benchmark_version": "benchv_",
    "evaluation": "eval_",
    "decision": "rdec_",
    "webhook_endpoint": "we_",
    "webhook_event": "evt_",
    "webhook_delivery": "whd_",
    "export": "export-",
    "run": "run_",
    "evaluation_job": "evaljob-",
    "registered_model": "rm_",
    "alias_change": "aliasc_",
    "monitor": "mon_",
    "monitor_look": "look_",
    "api_key": "key_",
    "audit_entry": "audit_",
}

_CHECKPOINT: Final = re.compile(r"(?P<version>ft:.+):ckpt-step-(?P<step>[0-9]{1,9})")


def public_id(kind: str, key: UUID) -> str:
    """The id that clients see for a row of this kind."""
    return PREFIXES[kind] + key.hex


def parse_id(kind: str, text: str, *, param: str | None = None) -> UUID:
    """The row's uuid for an id that a client sent.

    Raises:
        NotFound: The text is not an id of this kind, so no such row can exist.
    """
    prefix = PREFIXES[kind]
    body = text.removeprefix(prefix)
    if body == text or len(body) != 32:
        raise NotFound(f"No {kind.replace('_', ' ')} has the id '{text[:80]}'.", param)
    try:
        return UUID(hex=body)
    except ValueError:
        raise NotFound(f"No {kind.replace('_', ' ')} has the id '{text[:80]}'.", param) from None


def model_version_name(base: str, project: str, suffix: str | None, key: UUID) -> str:
    """The name of a published version: `ft:<base>:<project>:<suffix>:<8 hex digits>`, as OpenAI writes it."""
    return f"ft:{base}:{project}:{suffix or ''}:{key.hex[:8]}"


def split_checkpoint_name(name: str) -> tuple[str, int] | None:
    """The version's name and the step of a checkpoint's name; None for any other name."""
    found = _CHECKPOINT.fullmatch(name)
    return None if found is None else (found["version"], int(found["step"]))


def checkpoint_name(version_name: str, step: int) -> str:
    """The model name of a checkpoint: its version's (or job's would-be version's) with the step."""
    return f"{version_name}:ckpt-step-{step}"
