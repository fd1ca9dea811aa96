"""What a key may do, and who is calling."""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from uuid import UUID

from app.errors import BadRequest, Forbidden


class Scope(StrEnum):
    """One permission of a key, always within the key's own project."""

    JOBS_READ = "jobs:read"  # jobs with their events, checkpoints, decisions and frontier
    JOBS_WRITE = "jobs:write"  # submit, cancel, pause, resume
    FILES_READ = "files:read"
    FILES_WRITE = "files:write"
    MODELS_READ = "models:read"
    MODELS_WRITE = "models:write"  # publish and delete model versions, promote and roll back
    MODELS_FORCE = "models:force"  # promote what the gate refuses; each time with a reason
    BENCHMARKS_READ = "benchmarks:read"
    BENCHMARKS_WRITE = "benchmarks:write"
    RESULTS_READ = "results:read"
    RESULTS_WRITE = "results:write"  # post benchmark results, which are then only recorded
    RESULTS_ACT = "results:act"  # posted results may raise strengths and roll back
    WEBHOOKS_ADMIN = "webhooks:admin"
    KEYS_ADMIN = "keys:admin"  # make and revoke keys
    AUDIT_READ = "audit:read"  # who changed what in the project


#: What a key gets only by name: making further keys, passing gates, watching the others.
_NAMED_ONLY = {Scope.KEYS_ADMIN, Scope.MODELS_FORCE, Scope.AUDIT_READ}
#: A key that is made without naming scopes.
DEFAULT_SCOPES = tuple(scope for scope in Scope if scope not in _NAMED_ONLY)


@dataclass(frozen=True)
class Caller:
    """Whom a key speaks for."""

    project_id: UUID
    key_id: str
    scopes: frozenset[Scope]

    def require(self, scope: Scope) -> None:
        """Refuses a caller whose key lacks a scope.

        Raises:
            Forbidden: The key lacks it.
        """
        if scope not in self.scopes:
            raise Forbidden(f"The key lacks the scope '{scope.value}'.")


def parse_scopes(names: Iterable[str]) -> tuple[Scope, ...]:
    """The scopes of these names, each once, in the enum's order.

    Raises:
        BadRequest: No such scope.
    """
    wanted = set(names)
    unknown = wanted - set(Scope)
    if unknown:
        raise BadRequest(
            f"No scope is called '{min(unknown)}'; there are {', '.join(Scope)}.", "scopes"
        )
    return tuple(scope for scope in Scope if scope in wanted)
