"""The tree of errors that Retain raises on purpose; imports nothing.

    RetainError
    ├── BadRequest          400  what was asked for cannot be
    ├── Unauthorized        401
    ├── Forbidden           403
    ├── NotFound            404
    ├── Conflict            409
    ├── PreconditionFailed  412
    ├── TooLarge            413
    ├── UnprocessableKey    422  an Idempotency-Key used again for another body
    ├── QuotaExceeded       429
    ├── Unavailable         503
    ├── Fenced                   a stale attempt wrote; never reaches a client
    └── TrainingFailed           a trainer ended a job; becomes the job's `error`

Fields go to `Exception.__init__`, the text is made in `__str__`: so they survive pickling.
"""


class RetainError(Exception):
    """Base of every deliberate error.

    Args:
        message: What is wrong and what to do about it, naming the field.
        param: Path of the offending field (`retention.strategies.0.strength`), else None.
        code: Stable word that clients match on; the class's own when None.
    """

    code: str = "retain_error"

    def __init__(
        self, message: str = "", param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message, param, code)
        self.message = message
        self.param = param
        if code is not None:
            self.code = code

    def __str__(self) -> str:
        return self.message


class BadRequest(RetainError):
    """The request cannot be carried out as written."""

    code = "invalid_request"


class Unauthorized(RetainError):
    """No key, or one that is unknown, expired or revoked."""

    code = "invalid_api_key"


class Forbidden(RetainError):
    """The key lacks a scope."""

    code = "insufficient_scope"


class NotFound(RetainError):
    """No such thing in the caller's project."""

    code = "not_found"


class Conflict(RetainError):
    """The thing is in a state that does not allow this."""

    code = "conflict"


class PreconditionFailed(RetainError):
    """The thing has changed since the caller read it."""

    code = "precondition_failed"


class TooLarge(RetainError):
    """The body is over the limit."""

    code = "request_too_large"


class UnprocessableKey(RetainError):
    """An Idempotency-Key was used again with another body."""

    code = "idempotency_key_reused"


class QuotaExceeded(RetainError):
    """A limit of the project is reached."""

    code = "quota_exceeded"


class Unavailable(RetainError):
    """Something the server needs is away; trying again later may work."""

    code = "service_unavailable"


class Fenced(RetainError):
    """A write by an attempt that no longer holds the job's lease: stop at once, write nothing."""

    code = "fenced"


class TrainingFailed(RetainError):
    """A run ended for a reason that running it again cannot mend."""

    code = "training_failed"
