"""Aliases on a real database: compare-and-set under races, the gate with its force, rollback, and the ledger."""

import base64
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from sqlalchemy import select, text
from sqlalchemy.exc import IntegrityError

from app.db.models import Alias, AliasChange, Evaluation, ModelVersion, WebhookEvent
from app.db.session import transaction
from app.domain.aliases import Promote, RegisterVersion, RollBackAlias, UpdateRegisteredModel
from app.domain.messages import Finished
from app.domain.scopes import Scope
from app.domain.spec import JobSpec
from app.errors import Conflict, Forbidden, NotFound, PreconditionFailed
from app.services.aliases import Condition, delete_alias, promote, roll_back
from app.services.aliases_query import get_alias, list_history
from app.services.evaluations import unpack_bytes
from app.services.finishing import Uploads, finish_job
from app.services.lineage import list_ledger
from app.services.registered_models import (
    get_registered_model,
    list_versions,
    register_version,
    update_registered_model,
)
from app.services.storage import Stored
from tests.deployed import ALIAS, NAME, Deployed, make_deployed
from tests.factories import make_checkpoint, make_model_version
from tests.histories import ITEMS, make_scores


def events(session) -> list[dict[str, object]]:
    rows = session.scalars(
        select(WebhookEvent)
        .where(WebhookEvent.type == "registered_model.alias_moved")
        .order_by(WebhookEvent.seq)
    )
    return [row.payload["data"] for row in rows]


def history(session, deployed: Deployed, alias: str = ALIAS):
    return list_history(session, deployed.project.id, NAME, alias, after=None, limit=50)[0]


def test_every_move_is_a_line_of_history_and_an_event(session) -> None:
    deployed = make_deployed(session, num_versions=2)
    caller = deployed.caller
    moved = roll_back(session, caller, NAME, ALIAS, RollBackAlias(reason="users complain"))
    assert (moved.version.row.version, moved.alias.revision) == (1, 3)
    found = history(session, deployed)
    assert [(c.row.revision, c.row.action, c.from_version, c.to_version) for c in found] == [
        (3, "rollback", 2, 1),
        (2, "promote", 1, 2),
        (1, "promote", None, 1),
    ]
    assert (found[0].row.actor, found[0].row.reason) == (f"key:{caller.key_id}", "users complain")
    told = events(session)
    assert [event["revision"] for event in told] == [1, 2, 3]
    assert (told[2]["from_version"], told[2]["to_version"]) == (2, 1)
    assert told[2]["model"] == deployed.models[0].name


def test_history_cannot_be_rewritten(session) -> None:
    make_deployed(session)
    with pytest.raises(IntegrityError, match="written for good"), session.begin_nested():
        session.execute(text("UPDATE alias_changes SET reason = 'other'"))
    with pytest.raises(IntegrityError, match="written for good"), session.begin_nested():
        session.execute(text("DELETE FROM alias_changes"))


def test_promoting_what_is_there_moves_nothing(session) -> None:
    deployed = make_deployed(session)
    again = promote(session, deployed.caller, NAME, ALIAS, Promote(version=2))
    assert again.alias.revision == 2
    assert len(history(session, deployed)) == 2


def test_a_condition_that_does_not_hold_moves_nothing(session) -> None:
    deployed = make_deployed(session)
    caller = deployed.caller
    for condition, code in (
        (Condition(revision=1), "revision_mismatch"),
        (Condition(must_be_new=True), "alias_exists"),
    ):
        with pytest.raises(PreconditionFailed) as caught:
            promote(session, caller, NAME, ALIAS, Promote(version=1), condition)
        assert caught.value.code == code
    for condition in (Condition(revision=1), Condition(must_exist=True)):
        with pytest.raises(PreconditionFailed) as caught:
            promote(session, caller, NAME, "canary", Promote(version=1), condition)
        assert caught.value.code == "alias_not_found"
    with pytest.raises(PreconditionFailed):
        roll_back(session, caller, NAME, ALIAS, RollBackAlias(), Condition(revision=1))
    promote(session, caller, NAME, ALIAS, Promote(version=1), Condition(revision=2))
    promote(session, caller, NAME, "canary", Promote(version=1), Condition(must_be_new=True))
    assert get_alias(session, deployed.project.id, NAME, ALIAS).alias.revision == 3


def test_revisions_go_on_over_a_deletion(session) -> None:
    deployed = make_deployed(session)
    delete_alias(session, deployed.caller, NAME, ALIAS, Condition(revision=2))
    with pytest.raises(NotFound):
        get_alias(session, deployed.project.id, NAME, ALIAS)
    with pytest.raises(PreconditionFailed):
        promote(session, deployed.caller, NAME, ALIAS, Promote(version=1), Condition(revision=2))
    made = promote(
        session, deployed.caller, NAME, ALIAS, Promote(version=1), Condition(must_be_new=True)
    )
    assert made.alias.revision == 4
    assert [c.row.action for c in history(session, deployed)][:2] == ["promote", "delete"]


def test_of_two_writers_with_one_revision_one_wins(committed_factory) -> None:
    with transaction(committed_factory) as session:
        deployed = make_deployed(session, num_versions=3)
    start = threading.Barrier(2)

    def write(version: int) -> int | str:
        start.wait()
        try:
            with transaction(committed_factory) as session:
                moved = promote(
                    session,
                    deployed.caller,
                    NAME,
                    ALIAS,
                    Promote(version=version),
                    Condition(revision=3),
                )
                return moved.alias.revision
        except PreconditionFailed as error:
            return error.code

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(write, (1, 2)))
    assert sorted(found, key=str) == [4, "revision_mismatch"]
    with transaction(committed_factory) as session:
        assert session.scalars(select(Alias)).one().revision == 4
        assert len(session.scalars(select(AliasChange)).all()) == 4


def test_two_makers_of_one_alias_do_not_collide(committed_factory) -> None:
    with transaction(committed_factory) as session:
        deployed = make_deployed(session, num_versions=2)
    start = threading.Barrier(2)

    def write(version: int) -> str:
        start.wait()
        try:
            with transaction(committed_factory) as session:
                promote(
                    session,
                    deployed.caller,
                    NAME,
                    "canary",
                    Promote(version=version),
                    Condition(must_be_new=True),
                )
        except PreconditionFailed as error:
            return error.code
        return "made"

    with ThreadPoolExecutor(2) as pool:
        assert sorted(pool.map(write, (1, 2))) == ["alias_exists", "made"]


def test_the_gate_refuses_with_its_reason_and_force_is_written_down(session) -> None:
    deployed = make_deployed(session, num_versions=1)
    off = make_model_version(session, deployed.job, retention="off")
    register_version(session, deployed.project.id, NAME, RegisterVersion(model=off.name))
    with pytest.raises(Conflict, match="retention is 'off'") as caught:
        promote(session, deployed.caller, NAME, ALIAS, Promote(version=2))
    assert (caught.value.code, caught.value.param) == ("retention_not_held", "version")
    force = Promote(version=2, force=True, reason="a demonstration")
    with pytest.raises(Forbidden, match="models:force"):
        promote(session, deployed.caller, NAME, ALIAS, force)
    mighty = replace(deployed.caller, scopes=frozenset(Scope))
    promote(session, mighty, NAME, ALIAS, force)
    change = history(session, deployed)[0].row
    assert (change.forced, change.reason) == (True, "a demonstration")
    assert change.details["passed_by_force"][0]["code"] == "retention_not_held"
    # What was only forced in is no place to come back to.
    promote(session, deployed.caller, NAME, ALIAS, Promote(version=1))
    with pytest.raises(Conflict) as refused:
        roll_back(session, deployed.caller, NAME, ALIAS, RollBackAlias(to=2))
    assert refused.value.code == "retention_not_held"


def test_force_that_is_not_needed_is_not_written_down_as_such(session) -> None:
    deployed = make_deployed(session)
    body = Promote(version=1, force=True, reason="to be sure")
    promote(session, deployed.caller, NAME, ALIAS, body)
    assert not history(session, deployed)[0].row.forced


def test_a_pending_version_is_refused_also_by_force(session) -> None:
    deployed = make_deployed(session, num_versions=1)
    pending = make_model_version(session, deployed.job, status="pending")
    register_version(session, deployed.project.id, NAME, RegisterVersion(model=pending.name))
    mighty = replace(deployed.caller, scopes=frozenset(Scope))
    with pytest.raises(Conflict, match="is pending"):
        promote(session, mighty, NAME, ALIAS, Promote(version=2, force=True, reason="now"))


def test_rolling_back_needs_somewhere_to_go(session) -> None:
    deployed = make_deployed(session, num_versions=1)
    with pytest.raises(Conflict) as caught:
        roll_back(session, deployed.caller, NAME, ALIAS, RollBackAlias())
    assert caught.value.code == "no_good_version"


def test_a_model_is_registered_once(session) -> None:
    deployed = make_deployed(session, num_versions=1)
    body = RegisterVersion(model=deployed.models[0].name)
    again = register_version(session, deployed.project.id, NAME, body)
    assert again.version.row.version == 1
    shown = get_registered_model(session, deployed.project.id, NAME)
    assert (shown.row.version_count, shown.aliases) == (1, {ALIAS: 1})


def scored(session, deployed: Deployed, model: ModelVersion, lost: int) -> None:
    """Item scores of a model, as its job's report left them."""
    checkpoint = make_checkpoint(session, deployed.job, step=model.seq)
    model.checkpoint_id = checkpoint.id
    scores = make_scores(deployed.benchmark, lost=lost)
    session.add(
        Evaluation(
            project_id=deployed.project.id,
            subject_type="model",
            subject_key=model.name,
            model_version_id=model.id,
            benchmark_version_id=deployed.benchmark.id,
            benchmark=deployed.benchmark_name,
            metric="multiple_choice",
            purpose="monitor",
            source="run",
            value=0.5,
            n_samples=ITEMS,
            scores=base64.b64decode(scores.scores),
        )
    )
    session.flush()


def test_the_ledger_shows_the_drop_against_parent_and_root(session) -> None:
    deployed = make_deployed(session, num_versions=2)
    first, second = deployed.models
    second.parent_version_id = first.id
    scored(session, deployed, first, lost=30)
    scored(session, deployed, second, lost=90)
    shown, _ = list_versions(session, deployed.project.id, NAME, below=None, limit=10)
    newest, oldest = (entry.entry for entry in shown)
    assert oldest.against_root is not None
    assert oldest.against_root.drop == pytest.approx(30 / 1200)
    assert oldest.against_parent == oldest.against_root
    assert (oldest.parent, newest.parent) == (oldest.root, first.name)
    assert newest.against_parent is not None
    assert newest.against_parent.drop == pytest.approx(60 / 1170)
    assert newest.against_root is not None
    assert newest.against_root.drop == pytest.approx(90 / 1200)
    assert newest.against_root.benchmarks[0].before == pytest.approx(0.6)


def test_without_items_of_both_ends_the_steps_are_put_together(session) -> None:
    deployed = make_deployed(session, num_versions=2)
    first, second = deployed.models
    second.parent_version_id = first.id
    for model, drop in ((first, 0.02), (second, 0.03)):
        model.verdict = reading(drop)
    session.flush()
    entry = list_ledger(session, [second])[0]
    assert entry.against_parent is not None
    assert entry.against_parent.drop == pytest.approx(0.03)
    assert entry.against_root is not None
    assert entry.against_root.drop == pytest.approx(1 - 0.98 * 0.97)
    assert entry.against_root.is_chained


def reading(drop: float) -> dict[str, object]:
    return {
        "look": 1,
        "alpha": 0.05,
        "drop": drop,
        "stderr": 0.001,
        "lower": drop - 0.002,
        "upper": drop + 0.002,
        "limit": 0.03,
        "p_regress": 0.5,
        "verdict": "pass",
        "severe": False,
    }


def test_the_cap_of_the_cumulative_drop_refuses_a_promotion(session) -> None:
    deployed = make_deployed(session, num_versions=1)
    spent = make_model_version(session, deployed.job)
    register_version(session, deployed.project.id, NAME, RegisterVersion(model=spent.name))
    update_registered_model(
        session, deployed.project.id, NAME, UpdateRegisteredModel(max_cumulative_drop=0.05)
    )
    with pytest.raises(Conflict, match="never measured") as unknown:
        promote(session, deployed.caller, NAME, ALIAS, Promote(version=2))
    assert unknown.value.code == "cumulative_drop_unknown"
    scored(session, deployed, spent, lost=90)
    with pytest.raises(Conflict, match=r"7\.50% below") as caught:
        promote(session, deployed.caller, NAME, ALIAS, Promote(version=2))
    assert caught.value.code == "cumulative_drop_exceeded"
    update_registered_model(
        session, deployed.project.id, NAME, UpdateRegisteredModel(max_cumulative_drop=0.08)
    )
    promote(session, deployed.caller, NAME, ALIAS, Promote(version=2))


def test_a_job_that_names_a_version_publishes_its_child(session, tmp_path) -> None:
    deployed = make_deployed(session, num_versions=1)
    job, parent = deployed.job, deployed.models[0]
    spec = JobSpec.model_validate(job.spec)
    request = spec.request.model_copy(update={"model": parent.name})
    job.spec = spec.model_copy(update={"request": request}).model_dump(mode="json")
    job.start_version_id = parent.id
    checkpoint = make_checkpoint(session, job, step=30)
    session.flush()
    report = (make_scores(deployed.benchmark, item_set="report"),)
    message = Finished(
        id=1,
        checkpoint_id=str(checkpoint.id),
        artifact_directory=str(tmp_path),
        artifact_kind="full",
        alpha=1.0,
        report=report,
        tuned_report=report,
        valid_loss=1.0,
        frontier=(),
        result_csv="x.csv",
        trained_tokens=1,
        seconds={},
    )
    uploads = Uploads(Stored(path="models/x", sha256="0" * 64, size_bytes=1), None)
    finish_job(session, job.id, 1, message, uploads)
    child = session.get_one(ModelVersion, job.model_version_id)
    assert child.parent_version_id == parent.id
    entry = list_ledger(session, [child])[0]
    assert entry.parent == parent.name
    assert entry.against_root is not None
    assert entry.against_root.drop == pytest.approx(0.0)
    kept = session.scalars(select(Evaluation).where(Evaluation.purpose == "report")).one()
    assert unpack_bytes(kept.scores).sum() == 1200
