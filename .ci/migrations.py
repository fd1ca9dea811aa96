"""Migration drift: upgrade from empty, compare with the models, downgrade to empty, on a real Postgres."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from app.embedded import EmbeddedServices

ROOT = Path(__file__).resolve().parent.parent


def alembic(*arguments: str, database_url: str) -> int:
    """Exit status of an Alembic command on that database."""
    return subprocess.run(  # noqa: S603 - our own interpreter and arguments
        [sys.executable, "-m", "alembic", *arguments],
        cwd=ROOT,
        env=os.environ | {"RETAIN_DATABASE_URL": database_url},
        check=False,
    ).returncode


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as directory:
        services = EmbeddedServices(Path(directory))
        try:
            url = services.start().database_url
            steps = (("upgrade", "head"), ("check",), ("downgrade", "base"))
            sys.exit(any(alembic(*step, database_url=url) for step in steps))
        finally:
            services.stop()
