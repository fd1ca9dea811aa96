"""`retain models list` and `rollback` against a server."""

from collections.abc import Iterator

import pytest

from app.db.models import Project
from app.db.session import SessionFactory, transaction
from app.settings import Settings
from tests.app.cli.test_cli import retain, retain_process
from tests.deployed import Deployed, make_deployed
from tests.serving import make_caller, serving


@pytest.fixture
def surroundings(
    settings: Settings, committed_factory: SessionFactory
) -> Iterator[tuple[dict[str, str], Deployed]]:
    """How the command reaches a server, and what is deployed there."""
    project, key = make_caller(committed_factory, settings)
    with transaction(committed_factory) as session:
        deployed = make_deployed(
            session, num_versions=3, project=session.get_one(Project, project.id)
        )
    with serving(settings, committed_factory) as url:
        yield {"RETAIN_BASE_URL": url, "RETAIN_API_KEY": key}, deployed


def test_an_alias_is_listed_and_rolled_back(surroundings) -> None:
    where, deployed = surroundings
    listed = retain_process("models", "list", **where)
    (line,) = [text for text in listed.stdout.splitlines() if "support-bot@production" in text]
    assert line.split()[0] == deployed.models[2].name
    assert "held" in line
    done = retain("models", "rollback", "support-bot@production", "--reason", "slow", **where)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == deployed.models[1].name
    assert "version 3 -> 2" in done.stderr
    named = retain("models", "rollback", "support-bot@production", "--to", "1", **where)
    assert named.stdout.strip() == deployed.models[0].name


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["support-bot"], "NAME@ALIAS"),
        (["support-bot@nobody"], "404"),
        (["support-bot@production", "--to", "9"], "version_not_found"),
        (["support-bot@production", "--to", "first"], "400"),
        (["support-bot@production", "--to", "1", "--force"], "reason"),
    ],
)
def test_what_cannot_be_done_is_said_and_ends_with_1(surroundings, arguments, words) -> None:
    where, _ = surroundings
    done = retain("models", "rollback", *arguments, **where)
    assert (done.returncode, done.stdout) == (1, "")
    assert words in done.stderr
