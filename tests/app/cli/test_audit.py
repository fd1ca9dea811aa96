"""`retain audit`: what operator commands leave in the log, and its export."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.app.cli.test_cli import retain


@pytest.fixture
def environment(database: str, tmp_path: Path) -> dict[str, str]:
    return {"RETAIN_DATABASE_URL": database, "RETAIN_DATA_DIR": str(tmp_path)}


def exported(environment: dict[str, str], *options: str) -> list[dict[str, Any]]:
    done = retain("audit", "export", *options, **environment)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_operator_commands_leave_an_entry_each(environment: dict[str, str]) -> None:
    key = retain("keys", "create", "ci", "--project", "acme", **environment).stdout.strip()
    retain("keys", "rotate", key, **environment)
    retain("keys", "revoke", key, **environment)
    retain("projects", "set", "acme", "--max-queued-jobs", "3", **environment)
    refused = retain("keys", "revoke", "aaaaaaaa", **environment)
    assert refused.returncode == 1
    retain("keys", "list", **environment)
    found = exported(environment)
    assert [(entry["method"], entry["route"], entry["project"]) for entry in found] == [
        ("CLI", "retain keys create", "acme"),
        ("CLI", "retain keys rotate", "acme"),
        ("CLI", "retain keys revoke", "acme"),
        ("CLI", "retain projects set", None),
    ]
    assert all(entry["actor"].startswith("operator:") for entry in found)
    created, rotated, revoked, _ = (entry["object_ids"] for entry in found)
    assert created == revoked == rotated[:1]
    assert len(rotated) == 2
    assert key not in json.dumps(found)


def test_an_export_begins_where_it_is_asked_to(environment: dict[str, str]) -> None:
    retain("keys", "create", "ci", **environment)
    [entry] = exported(environment)
    assert exported(environment, "--since", "2999-01-01") == []
    assert exported(environment, "--since", entry["created_at"]) == [entry]
    assert exported(environment, "--actor", "operator:nobody-of-this-name") == []
    assert exported(environment, "--object-id", entry["object_ids"][0]) == [entry]
    wrong = retain("audit", "export", "--since", "yesterday", **environment)
    assert (wrong.returncode, "2026-01-31" in wrong.stderr) == (1, True)
