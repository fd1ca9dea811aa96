"""API keys: made once, shown once, checked on every request."""

import hashlib
import hmac
import secrets
import string
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from typing import NamedTuple
from uuid import UUID

from sqlalchemy.orm import Session

from app.db.models import ApiKey
from app.db.repositories.keys import KeyRepository, ProjectRepository
from app.domain.keys import CreateKey
from app.domain.scopes import DEFAULT_SCOPES, Caller, Scope, parse_scopes
from app.errors import BadRequest, Conflict, NotFound, Unauthorized

PREFIX = "rt_live"
DEFAULT_PROJECT = "default"
_ID_ALPHABET = string.ascii_lowercase + string.digits
_ID_LENGTH = 8
_SECRET_BYTES = 32  # 43 characters of URL-safe base64; random, so a fast hash is enough
_NO_SECRET = hashlib.sha256(b"no such key").hexdigest()
_TOUCH_AFTER = timedelta(minutes=1)


class CreatedKey(NamedTuple):
    """A new key's row, and the text that only its maker ever sees."""

    row: ApiKey
    text: str


def create_key(
    session: Session,
    *,
    project_id: UUID,
    name: str,
    scopes: Iterable[Scope] = DEFAULT_SCOPES,
    expires_at: datetime | None = None,
) -> CreatedKey:
    """Makes a key `rt_live_<8 characters>_<43 characters>`; the second part is kept as SHA-256 alone.

    Raises:
        BadRequest: The name is empty or too long.
    """
    if not 1 <= len(name.strip()) <= 128:
        raise BadRequest("A key's name has 1 to 128 characters.", "name")
    key_id = "".join(secrets.choice(_ID_ALPHABET) for _ in range(_ID_LENGTH))
    secret = secrets.token_urlsafe(_SECRET_BYTES)
    row = ApiKey(
        project_id=project_id,
        name=name.strip(),
        key_id=key_id,
        secret_sha256=_hash(secret),
        scopes=[scope.value for scope in scopes],
        expires_at=expires_at,
    )
    KeyRepository(session).add(row)
    return CreatedKey(row, f"{PREFIX}_{key_id}_{secret}")


def authenticate(session: Session, bearer: str) -> Caller:
    """Whom a bearer key speaks for.

    Raises:
        Unauthorized: The key is malformed, unknown, expired or revoked; which one is not said.
    """
    key_id, secret = _split(bearer)
    row = KeyRepository(session).find_live(key_id) if key_id else None
    # Compared also when nothing was found: the answer takes as long for an unknown id as for a wrong secret.
    is_right = hmac.compare_digest(_hash(secret), _NO_SECRET if row is None else row.secret_sha256)
    if row is None or not is_right:
        raise Unauthorized("The API key is unknown, expired or revoked.")
    if row.last_used_at is None or row.last_used_at < datetime.now(UTC) - _TOUCH_AFTER:
        KeyRepository(session).touch(row.key_id)
    # A scope that a later release dropped means nothing here.
    scopes = frozenset(Scope(name) for name in row.scopes if name in set(Scope))
    return Caller(row.project_id, row.key_id, scopes)


def revoke_key(session: Session, key_id: str, *, project_id: UUID | None = None) -> None:
    """Revokes a key by its public id, or by the whole key; within seconds it works nowhere.

    Raises:
        NotFound: No live key has this id.
    """
    public, _ = _split(key_id)
    if not KeyRepository(session).revoke(public or key_id, project_id):
        raise NotFound(f"No live key has the id '{(public or key_id)[:_ID_LENGTH]}'.", "key_id")


def grant_key(session: Session, caller: Caller, wish: CreateKey) -> CreatedKey:
    """Makes a key of the caller's project on the caller's word.

    Raises:
        BadRequest: An unknown scope, or none that could be given.
        Forbidden: A scope that the caller lacks itself.
    """
    scopes = parse_scopes(
        [scope for scope in DEFAULT_SCOPES if scope in caller.scopes]
        if wish.scopes is None
        else wish.scopes
    )
    if not scopes:
        raise BadRequest("scopes: name them; the caller has none that it gives unasked.", "scopes")
    _check_grant(caller, scopes)
    life = wish.expires_in_seconds
    expires_at = None if life is None else datetime.now(UTC) + timedelta(seconds=life)
    return create_key(
        session,
        project_id=caller.project_id,
        name=wish.name,
        scopes=scopes,
        expires_at=expires_at,
    )


def rotate_key(
    session: Session, caller: Caller, key_id: UUID, overlap_seconds: float
) -> CreatedKey:
    """Makes a key that replaces one of the caller's project; both work until the overlap is over.

    Raises:
        NotFound: The project has no such key.
        Forbidden: The key has a scope that the caller lacks.
        Conflict: The key has expired.
    """
    old = KeyRepository(session).get(caller.project_id, key_id, for_update=True)
    _check_grant(caller, [Scope(name) for name in old.scopes if name in set(Scope)])
    return replace_key(session, old, overlap_seconds)


def replace_key(session: Session, old: ApiKey, overlap_seconds: float) -> CreatedKey:
    """A key with the old one's project, name, scopes and end; the old one ends after the overlap.

    Raises:
        Conflict: The old one has expired already.
    """
    repository = KeyRepository(session)
    if repository.find_live(old.key_id) is None:
        raise Conflict("The key has expired; make a new one.", "api_key_id", "key_expired")
    created = create_key(
        session,
        project_id=old.project_id,
        name=old.name,
        scopes=[Scope(name) for name in old.scopes if name in set(Scope)],
        expires_at=old.expires_at,
    )
    created.row.rotated_from_id = old.id
    repository.end_after(old, overlap_seconds)
    return created


def get_key(session: Session, project_id: UUID, key_id: UUID) -> ApiKey:
    """A key of a project that is not revoked.

    Raises:
        NotFound: The project has no such key.
    """
    return KeyRepository(session).get(project_id, key_id)


def find_key(session: Session, key_id: str) -> ApiKey:
    """A key by its public id, or by the whole key; for the operator.

    Raises:
        NotFound: No live key has this id.
    """
    public, _ = _split(key_id)
    row = KeyRepository(session).find_by_public(public or key_id)
    if row is None:
        raise NotFound(f"No live key has the id '{(public or key_id)[:_ID_LENGTH]}'.", "key_id")
    return row


def list_project_keys(
    session: Session, project_id: UUID, *, after: UUID | None, limit: int
) -> tuple[list[ApiKey], bool]:
    """A page of a project's keys that are not revoked, newest first, and whether there are more.

    Raises:
        NotFound: `after` is no such key.
    """
    repository = KeyRepository(session)
    last = None if after is None else repository.get(project_id, after)
    found = repository.list_page(project_id, after=last, limit=limit + 1)
    return found[:limit], len(found) > limit


def list_keys(session: Session, *, project: str | None = None) -> list[tuple[ApiKey, str]]:
    """Every key with its project's name, oldest first.

    Raises:
        NotFound: No such project.
    """
    project_id = None if project is None else ProjectRepository(session).get_by_name(project).id
    return KeyRepository(session).list_all(project_id)


def ensure_project(session: Session, name: str) -> UUID:
    """The id of the project of this name, made when missing.

    Raises:
        BadRequest: The name cannot be one.
    """
    if not 1 <= len(name) <= 64 or not set(name) <= set(
        string.ascii_letters + string.digits + "-_."
    ):
        raise BadRequest(
            "A project's name has 1 to 64 letters, digits, '-', '_' or '.'.", "project"
        )
    return ProjectRepository(session).ensure(name).id


def _check_grant(caller: Caller, scopes: Iterable[Scope]) -> None:
    for scope in scopes:
        caller.require(scope)


def _split(bearer: str) -> tuple[str, str]:
    parts = bearer.split("_", 3)
    if len(parts) != 4 or "_".join(parts[:2]) != PREFIX or not set(parts[2]) <= set(_ID_ALPHABET):
        return "", bearer
    return parts[2], parts[3]


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode(errors="surrogatepass")).hexdigest()
