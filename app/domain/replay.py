"""A recorded decision computed again from its evidence, and where the two differ."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

from app.domain.controller import decide
from app.domain.decisions import Action, ControllerState, Decision, LeverState, Look
from app.domain.overrides import OverrideEvidence, override
from app.domain.policy import Policy
from app.domain.stopping import EARLY_STOPPING
from app.errors import BadRequest, Conflict

#: By which `decide()` decides, kept with the evidence. Raise it when equal arguments come to give another decision,
#: and teach `_decide_by` the old answer. A new field whose default gives the old answer needs neither.
#: 2: a repair activates the armed strategy that comes next, where it only scaled back.
#: 3: a dry run says of an early stop that it is proposed once.
RULES: Final = 3


class Difference(NamedTuple):
    """One field that was recorded otherwise than it comes out."""

    path: str
    recorded: Any
    recomputed: Any


def replay(evidence: Mapping[str, Any]) -> Decision:
    """The decision that this evidence leads to, by the controller or, where a person ordered it, by the order.

    It is computed by the rules that held when it was recorded; fields that came later have their defaults, with
    which those rules are today's.

    Raises:
        Conflict: The evidence was recorded by rules that this version does not know yet, or by the first law of
            `dual`, which it no longer computes.
        BadRequest: Its rules are no number of rules.
    """
    rules = rules_of(evidence)
    policy = Policy.model_validate(evidence["policy"])
    if policy.controller == "dual" and "headroom" not in evidence["policy"].get("dual", {}):
        raise Conflict(
            "policy.dual: the evidence was recorded by a law that aimed at the limit itself; this version has"
            " another.",
            "policy.dual",
            "older_law",
        )
    levers = [LeverState.model_validate(lever) for lever in evidence["levers"]]
    state = ControllerState.model_validate(evidence["state"])
    look = Look.model_validate(evidence["look"])
    if "override" not in evidence:
        return _decide_by(rules, policy, levers, state, look)
    order = OverrideEvidence.model_validate(evidence["override"])
    return override(policy, levers, state, look, order)


def rules_of(evidence: Mapping[str, Any]) -> int:
    """The rules by which evidence was decided on; before they were kept with it, its fields tell.

    Raises:
        Conflict: This version does not know them yet.
        BadRequest: They are no number of rules.
    """
    if "rules" not in evidence:
        state = evidence["state"]
        return 1 if "best_scores" not in state else 2 if "stop_proposed" not in state else 3
    rules = evidence["rules"]
    if not isinstance(rules, int) or isinstance(rules, bool) or rules < 1:
        raise BadRequest("rules: the evidence names no rules of the controller.", "rules")
    if rules > RULES:
        raise Conflict(
            f"rules: the evidence was recorded by rules {rules} of the controller, and this version knows"
            f" those up to {RULES}; replay it with a newer one.",
            "rules",
            "newer_rules",
        )
    return rules


def differences(
    recorded: Mapping[str, Any], recomputed: Mapping[str, Any], *, at: str = ""
) -> Iterator[Difference]:
    """Where two decisions differ, field by field."""
    for name in sorted(recorded.keys() | recomputed.keys()):
        old, new = recorded.get(name), recomputed.get(name)
        path = f"{at}.{name}" if at else name
        if isinstance(old, dict) and isinstance(new, dict):
            yield from differences(old, new, at=path)
        elif old != new:
            yield Difference(path, old, new)


def _decide_by(
    rules: int, policy: Policy, levers: Sequence[LeverState], state: ControllerState, look: Look
) -> Decision:
    """What `decide()` said of this by earlier rules."""
    decision = decide(policy, levers, state, look)
    if rules < 2 and decision.action is Action.REPAIR:
        on = [lever for lever in levers if not lever.armed or state.strengths[lever.strategy] > 0]
        decision = decide(policy, on, state, look)
    if rules < 3 and decision.is_proposal and decision.code == EARLY_STOPPING:
        plain = decide(policy.model_copy(update={"dry_run": False}), levers, state, look)
        decision = plain.model_copy(update={"is_proposal": True})
    return decision
