"""A recorded decision computed again from its evidence, and where the two differ."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from app.domain.controller import decide
from app.domain.decisions import ControllerState, Decision, LeverState, Look
from app.domain.overrides import OverrideEvidence, override
from app.domain.policy import Policy


class Difference(NamedTuple):
    """One field that was recorded otherwise than it comes out."""

    path: str
    recorded: Any
    recomputed: Any


def replay(evidence: Mapping[str, Any]) -> Decision:
    """The decision that this evidence leads to, by the controller or, where a person ordered it, by the order."""
    policy = Policy.model_validate(evidence["policy"])
    levers = [LeverState.model_validate(lever) for lever in evidence["levers"]]
    state = ControllerState.model_validate(evidence["state"])
    look = Look.model_validate(evidence["look"])
    if "override" not in evidence:
        return decide(policy, levers, state, look)
    order = OverrideEvidence.model_validate(evidence["override"])
    return override(policy, levers, state, look, order)


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
