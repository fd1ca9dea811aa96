"""Replay of evidence that earlier versions recorded, whose fields and rules were fewer."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from app.domain.decisions import Action, ControllerState, Decision, LeverState, Look
from app.domain.overrides import OverrideEvidence
from app.domain.policy import Policy
from app.domain.replay import RULES, differences, replay, rules_of
from app.errors import BadRequest, Conflict

#: As they were written by versions before: without stages, without `dry_run`, without `dual`, and before
#: a dry run counted; one of each action, code and state of an armed lever.
RECORDED = [
    json.loads(line)
    for line in Path(__file__).with_name("recorded_evidence.jsonl").read_text().splitlines()
]
#: Fields that came after evidence was first recorded, newest first.
NEWER = [
    ("look", "diagnosis"),
    ("policy", "diagnosis"),
    ("rules",),
    ("state", "stop_proposed"),
    ("state", "best_scores"),
    ("state", "excess_smoothed"),
    ("state", "law_factor"),
    ("state", "law_excess"),
    ("look", "metric"),
    ("policy", "dual"),
    ("policy", "early_stopping", "metric"),
    ("policy", "on_no_gain"),
    ("look", "reading", "gains"),
    ("policy", "dry_run"),
    ("look", "stages"),
]


def disagreements(evidence: dict[str, Any], recorded: dict[str, Any]) -> list[Any]:
    """As the command line compares: what an older version did not write has its default."""
    written = Decision.model_validate(recorded).model_dump(mode="json")
    return list(differences(written, replay(evidence).model_dump(mode="json")))


@pytest.mark.parametrize(
    "row",
    RECORDED,
    ids=[f"{number}-{row['decision']['code']}" for number, row in enumerate(RECORDED)],
)
def test_what_earlier_versions_decided_comes_out_again(row: dict[str, Any]) -> None:
    assert rules_of(row["evidence"]) == row["rules"]
    assert disagreements(row["evidence"], row["decision"]) == []


def test_the_recorded_ones_hold_every_action_and_both_old_rules() -> None:
    assert {row["rules"] for row in RECORDED} == {1, 2}
    assert {row["decision"]["action"] for row in RECORDED} == set(Action)
    assert any("stages" not in row["evidence"]["look"] for row in RECORDED)
    assert any("dry_run" not in row["evidence"]["policy"] for row in RECORDED)
    assert any("is_proposal" in row["decision"] and row["rules"] == 1 for row in RECORDED)


def find(**wanted: Any) -> dict[str, Any]:
    for row in RECORDED:
        decision = row["decision"] | {"rules": row["rules"]}
        levers = row["evidence"]["levers"]
        strengths = row["evidence"]["state"]["strengths"]
        decision["off"] = any(
            lever["armed"] and not strengths[lever["strategy"]] for lever in levers
        )
        if all(decision.get(name, False) == value for name, value in wanted.items()):
            return copy.deepcopy(row)
    raise AssertionError(wanted)


def test_the_same_evidence_under_todays_rules_gives_todays_decision() -> None:
    repair = find(action="repair", off=True, rules=1)
    assert replay(repair["evidence"]).lever is None
    found = disagreements(repair["evidence"] | {"rules": 2}, repair["decision"])
    assert {one.path for one in found} == {"lever", "reason", "state.strengths.ewc"}
    stop = find(code="early_stopping", is_proposal=True, rules=2)
    found = disagreements(stop["evidence"] | {"rules": 3}, stop["decision"])
    assert {one.path for one in found} == {"reason"}


@pytest.mark.parametrize("rules", [1, 2])
def test_age_excuses_no_tampering(rules: int) -> None:
    row = find(action="raise_strength", rules=rules)
    row["decision"]["state"]["strengths"]["ewc"] = 64.0
    assert [one.path for one in disagreements(row["evidence"], row["decision"])] == [
        "state.strengths.ewc"
    ]
    row = find(action="repair", rules=rules, off=True)
    row["decision"]["reason"] = "all was well"
    assert [one.path for one in disagreements(row["evidence"], row["decision"])] == ["reason"]


def without(evidence: dict[str, Any], path: tuple[str, ...]) -> None:
    *above, last = path
    for name in above:
        evidence = evidence[name]
    evidence.pop(last, None)


def fresh(row: dict[str, Any]) -> dict[str, Any]:
    """Evidence as it is recorded now, every field written out."""
    evidence = row["evidence"]
    return {
        "policy": Policy.model_validate(evidence["policy"]).model_dump(mode="json"),
        "levers": [
            LeverState.model_validate(lever).model_dump(mode="json") for lever in evidence["levers"]
        ],
        "state": ControllerState.model_validate(evidence["state"]).model_dump(mode="json"),
        "look": Look.model_validate(evidence["look"]).model_dump(mode="json"),
        "rules": RULES,
    }


@pytest.mark.parametrize("depth", range(1, len(NEWER) + 1))
def test_evidence_stripped_of_its_newer_fields_replays_the_same(depth: int) -> None:
    changed_since = {("repair", "drop_confirmed"), ("stop", "early_stopping")}
    for row in RECORDED:
        evidence = fresh(row)
        decision = replay(evidence)
        if (decision.action.value, decision.code) in changed_since or decision.is_proposal:
            continue  # these are the rules' own, tested above with what was recorded
        for path in NEWER[:depth]:
            without(evidence, path)
        assert replay(evidence) == decision


def test_an_order_of_a_person_replays_without_the_newer_fields() -> None:
    evidence = fresh(find(action="raise_strength", off=False, rules=2))
    asked = {"action": "set_strength", "reason": "r", "strategy": "ewc", "strength": 3.5}
    evidence["override"] = OverrideEvidence.model_validate(
        {
            "asked": asked,
            "reason": "r",
            "by": "k",
            "decision_id": "rdec_1",
            "before": evidence["state"],
            "after": evidence["state"],
            "action": "raise_strength",
        }
    ).model_dump(mode="json")
    decision = replay(evidence)
    assert decision.code == "override_set_strength"
    for path in NEWER:
        without(evidence, path)
    for name in ("before", "after"):
        for path in NEWER:
            if path[0] == "state":
                evidence["override"][name].pop(path[1], None)
    assert replay(evidence) == decision


def test_rules_of_a_later_version_are_told_and_nonsense_is_refused() -> None:
    evidence = fresh(RECORDED[0])
    assert rules_of(evidence) == RULES
    with pytest.raises(
        Conflict, match=f"rules {RULES + 1} .* up to {RULES}; replay it with a newer"
    ):
        replay(evidence | {"rules": RULES + 1, "unheard_of": 1})
    for rules in (0, -1, True, "1", None, 1.5):
        with pytest.raises(BadRequest, match="names no rules"):
            replay(evidence | {"rules": rules})
