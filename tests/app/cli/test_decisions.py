"""`retain decisions`: replayed from what the server kept, and told apart from what was tampered with."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from sqlalchemy import Engine, text

from app.db.session import SessionFactory
from app.settings import Settings
from tests.app.cli.test_cli import retain, retain_process
from tests.external import point, registration, scores
from tests.serving import make_caller, serving


@pytest.fixture
def surroundings(
    settings: Settings, committed_factory: SessionFactory
) -> Iterator[tuple[dict[str, str], list[dict[str, Any]]]]:
    """How the command reaches a server, and three decisions there: a keep, a raise, and a person's order."""
    _, key = make_caller(committed_factory, settings)
    with serving(settings, committed_factory) as url:
        head = {"authorization": f"Bearer {key}"}
        with httpx.Client(base_url=f"{url}/v1", headers=head, timeout=30) as client:
            run = f"/runs/{client.post('/runs', json=registration()).json()['id']}"
            client.post(f"{run}/baseline", json={"scores": [scores()]})
            client.post(f"{run}/evaluations", json=point(10))
            made = client.post(f"{run}/evaluations", json=point(20, 42)).json()
            body = {"action": "keep_training", "reason": "wait"}
            client.post(f"{run}/decisions/{made['id']}/override", json=body)
            rows = client.get(f"{run}/decisions").json()["data"]
        yield {"RETAIN_BASE_URL": url, "RETAIN_API_KEY": key}, rows


def tamper(engine: Engine, decision: str, change: str) -> None:
    """Rewrites a row as only who owns the database could."""
    with engine.begin() as connection:
        connection.execute(text("ALTER TABLE decisions DISABLE TRIGGER decisions_stay"))
        connection.execute(
            text(f"UPDATE decisions SET {change} WHERE id = CAST(:id AS uuid)"),
            {"id": decision.removeprefix("rdec_")},
        )
        connection.execute(text("ALTER TABLE decisions ENABLE TRIGGER decisions_stay"))


def test_every_decision_replays_and_is_listed(surroundings) -> None:
    where, rows = surroundings
    assert [row["action"] for row in rows] == ["keep", "raise_strength", "keep"]
    for row in rows:
        done = retain("decisions", "replay", row["id"], **where)
        assert done.returncode == 0, done.stderr
        assert "They agree." in done.stdout
        assert done.stdout.count(f"{row['action']} ({row['code']})") == 2
    listed = retain_process("decisions", "list", rows[0]["run_id"], **where)
    assert [row["id"] for row in rows] == [
        line.split()[0] for line in listed.stdout.splitlines() if line.startswith("rdec_")
    ]
    as_json = retain("decisions", "list", rows[0]["run_id"], "--json", **where)
    assert len(json.loads(as_json.stdout)) == 3


@pytest.mark.parametrize(
    ("change", "shows"),
    [
        ("decision = jsonb_set(decision, '{state,strengths,ewc}', '64')", "state.strengths.ewc"),
        ("evidence = jsonb_set(evidence, '{look,reading,verdict}', '\"pass\"')", "action"),
        ("evidence = jsonb_set(evidence, '{policy,ladder,raise_factor}', '9')", "reason"),
        ("reason = 'all was well'", "row.reason"),
        ("action = 'keep'", "row.action"),
    ],
)
def test_a_tampered_row_is_found(
    surroundings, committed_engine: Engine, change: str, shows: str
) -> None:
    where, rows = surroundings
    tamper(committed_engine, rows[1]["id"], change)
    done = retain("decisions", "replay", rows[1]["id"], **where)
    assert done.returncode == 1
    assert shows in done.stdout
    assert "is not what its evidence leads to" in done.stderr


OLDER = (
    "rules",
    "state,stop_proposed",
    "state,best_scores",
    "state,excess_smoothed",
    "state,law_factor",
    "state,law_excess",
    "look,metric",
    "look,stages",
    "look,reading,gains",
    "policy,dual",
    "policy,dry_run",
    "policy,on_no_gain",
    "policy,early_stopping,metric",
)


def test_evidence_of_an_earlier_version_replays_and_says_so(
    surroundings, committed_engine: Engine
) -> None:
    where, rows = surroundings
    stripped = "evidence" + "".join(f" #- '{{{path}}}'" for path in OLDER)
    for row in rows[:2]:
        tamper(committed_engine, row["id"], f"evidence = {stripped}")
        done = retain("decisions", "replay", row["id"], **where)
        assert done.returncode == 0, done.stderr
        assert "The evidence is of rules 1 of the controller, before those of now" in done.stdout
        assert "They agree." in done.stdout
    tamper(committed_engine, rows[1]["id"], "reason = 'all was well'")
    assert retain("decisions", "replay", rows[1]["id"], **where).returncode == 1
    tamper(committed_engine, rows[2]["id"], "evidence = jsonb_set(evidence, '{rules}', '99')")
    done = retain("decisions", "replay", rows[2]["id"], **where)
    assert done.returncode == 1
    assert "recorded by rules 99" in done.stderr
    assert "replay it with a newer one" in done.stderr


def test_evidence_that_leads_nowhere_and_an_unknown_id(
    surroundings, committed_engine: Engine
) -> None:
    where, rows = surroundings
    tamper(committed_engine, rows[1]["id"], "evidence = evidence - 'policy'")
    done = retain("decisions", "replay", rows[1]["id"], **where)
    assert (done.returncode, "leads to no decision" in done.stderr) == (1, True)
    unknown = retain("decisions", "replay", "rdec_" + "0" * 32, **where)
    assert (unknown.returncode, "not_found" in unknown.stderr) == (1, True)
