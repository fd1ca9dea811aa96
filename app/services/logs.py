"""How every process logs: one line an event, as text or JSON, with secrets taken out."""

import logging
import re
import sys
from collections.abc import MutableMapping
from typing import Any

import structlog

from app.settings import Settings

_SECRETS = re.compile(
    r"(rt_live_[a-z0-9]{8}_)[\w-]+|(whsec_)[\w+/=-]+|((?:[Aa]uthorization|[Bb]earer)[\"':= ]+)[\w.-]{8,}"
    r"|(\w+://[^\s:/@]*:)[^\s/@]+(?=@)"
)
_HIDDEN_KEYS = frozenset({"authorization", "password", "secret", "api_key"})


def configure_logging(settings: Settings) -> None:
    """Sets up structlog and the standard library's loggers, to standard error."""
    renderer: Any = (
        structlog.processors.JSONRenderer()
        if settings.log_json
        else structlog.dev.ConsoleRenderer(
            colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback
        )
    )
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
        hide_secrets,
    ]
    structlog.configure(
        processors=[*shared, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                hide_secrets,
                renderer,
            ],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.INFO)
    for name in ("httpx", "httpcore", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)


def hide_secrets(
    _logger: object, _method: str, event: MutableMapping[str, Any]
) -> MutableMapping[str, Any]:
    """Replaces keys, webhook secrets and passwords, wherever they stand in a line's text."""
    for key, value in event.items():
        if key.lower() in _HIDDEN_KEYS:
            event[key] = "***"
        elif isinstance(value, str):
            event[key] = _SECRETS.sub(_keep_label, value)
    return event


def _keep_label(found: re.Match[str]) -> str:
    return next(group for group in found.groups() if group is not None) + "***"
