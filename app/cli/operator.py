"""What operator commands share: the data directory's settings and its database."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Annotated

import typer

from app.db.session import SessionFactory, build_engine, build_session_factory
from app.embedded import operator_database
from app.embedded.schema import upgrade
from app.services.audit import following, operator_trail
from app.settings import Settings, load_settings

DataDir = Annotated[
    Path | None,
    typer.Option(
        "--data-dir",
        help="Holds database, files and models. [default: RETAIN_DATA_DIR, else .retain]",
        show_default=False,
    ),
]


def settings_for(data_dir: Path | None) -> Settings:
    """The process's settings, with another data directory when one is given."""
    settings = load_settings()
    return settings if data_dir is None else settings.model_copy(update={"data_dir": data_dir})


@contextmanager
def open_database(settings: Settings, *, command: str | None = None) -> Iterator[SessionFactory]:
    """Sessions on the data directory's database, brought to the newest schema; started when it is not running.

    Args:
        settings: Say where it is.
        command: Of a command that changes something: what the audit log calls it. Sign inside.
    """
    with operator_database(settings) as database_url:
        upgrade(database_url)
        engine = build_engine(database_url, application="retain-cli")
        try:
            with nullcontext() if command is None else following(operator_trail(command)):
                yield build_session_factory(engine)
        finally:
            engine.dispose()
