"""The `retain` command."""

import sys

import typer

from app.cli.audit import audit
from app.cli.backup import backup, restore
from app.cli.benchmarks import benchmarks
from app.cli.decisions import decisions
from app.cli.jobs import jobs
from app.cli.keys import keys
from app.cli.models import models
from app.cli.output import complain
from app.cli.projects import projects
from app.cli.server import up
from app.errors import RetainError

EPILOG = (
    "up, keys, projects, audit, backup, restore, models add and models build-demo work on the data directory (RETAIN_DATA_DIR). The other"
    " commands speak HTTP to RETAIN_BASE_URL (http://127.0.0.1:8000) with the key in RETAIN_API_KEY."
    " Exit status: 0 done, 1 it failed and the message says why, 2 wrong usage, 3 the watched job failed or"
    " was cancelled."
)

retain = typer.Typer(
    name="retain",
    help="Fine-tunes language models without letting them forget.",
    epilog=EPILOG,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
retain.command()(up)
retain.command()(backup)
retain.command()(restore)
retain.add_typer(keys, name="keys")
retain.add_typer(projects, name="projects")
retain.add_typer(models, name="models")
retain.add_typer(jobs, name="jobs")
retain.add_typer(benchmarks, name="benchmarks")
retain.add_typer(decisions, name="decisions")
retain.add_typer(audit, name="audit")


def main() -> None:
    """Runs the command line; an error on purpose ends in one message and status 1."""
    try:
        retain()
    except RetainError as error:
        complain(str(error))
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
