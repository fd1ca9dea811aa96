"""Postgres' own programs for dumps: which ones, and how they are called."""

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Final, NamedTuple

from psycopg.conninfo import conninfo_to_dict

from app.embedded.postgres import WHEEL
from app.errors import Unavailable

DUMP: Final = "pg_dump"
RESTORE: Final = "pg_restore"
LONGEST_SECONDS: Final = 24 * 3600
_VERSION: Final = re.compile(r"\(PostgreSQL\) (\d+)")
_VARIABLES: Final = {
    "host": "PGHOST",
    "port": "PGPORT",
    "user": "PGUSER",
    "password": "PGPASSWORD",
    "dbname": "PGDATABASE",
    "sslmode": "PGSSLMODE",
    "sslrootcert": "PGSSLROOTCERT",
}


class DumpFailed(Unavailable):
    """A program of Postgres cannot be had, does not fit the server, or failed."""

    code = "dump_failed"


class Program(NamedTuple):
    """A program and the major version of Postgres that it belongs to."""

    path: str
    major: int


def plain_url(database_url: str) -> str:
    """The URL as Postgres' own library reads it."""
    return database_url.replace("postgresql+psycopg://", "postgresql://", 1)


def find_program(name: str, *, server_major: int, given: Path | None = None) -> Program:
    """The program to use on a server: the given one, else the embedded Postgres' own, else one on PATH.

    Args:
        name: `pg_dump` or `pg_restore`.
        server_major: The server's major version; an older program cannot read it.
        given: Where pg_dump is, by the settings; its siblings lie beside it.

    Raises:
        DumpFailed: There is none, or all are older than the server.
    """
    places: list[str | None] = []
    if given is not None:
        places.append(str(given if given.name == name else given.parent / name))
    else:
        own = None if WHEEL is None else WHEEL / f"pginstall{server_major}" / "bin" / name
        places += [str(own) if own is not None and own.exists() else None, shutil.which(name)]
    found = [Program(place, _major_of(place)) for place in places if place is not None]
    for program in found:
        if program.major >= server_major:
            return program
    if found:
        raise DumpFailed(
            f"{found[0].path} is of Postgres {found[0].major}, the server is {server_major}: set RETAIN_PG_DUMP"
            f" to a pg_dump of version {server_major} or newer."
        )
    raise DumpFailed(
        f"There is no {name}: install Postgres' client programs, or set RETAIN_PG_DUMP."
    )


def run_program(program: Program, database_url: str, *arguments: str) -> None:
    """Runs a program on a database; the password is in its environment, which other users cannot read.

    Raises:
        DumpFailed: It failed; the message holds what it said.
    """
    parts = conninfo_to_dict(plain_url(database_url))
    unknown = set(parts) - set(_VARIABLES)
    if unknown:
        raise DumpFailed(
            f"The database's URL has {min(unknown)}, which {program.path} is not told."
        )
    told = {_VARIABLES[name]: str(value) for name, value in parts.items() if value is not None}
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
    done = subprocess.run(  # noqa: S603 - our own command line, without a shell
        [program.path, *arguments],
        env=kept | told,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=LONGEST_SECONDS,
        check=False,
    )
    if done.returncode != 0:
        said = done.stderr.strip().splitlines()
        raise DumpFailed(f"{program.path} failed: {' '.join(said[:3]) or done.returncode}")


def _major_of(path: str) -> int:
    try:
        said = subprocess.run(  # noqa: S603 - a program that the operator named, or of PATH
            [path, "--version"], capture_output=True, text=True, timeout=30, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise DumpFailed(f"{path} does not run: {error}") from None
    found = _VERSION.search(said)
    if found is None:
        raise DumpFailed(f"{path} is not a program of Postgres: it says {said[:80]!r}.")
    return int(found[1])
