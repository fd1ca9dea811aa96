"""The dashboard in a real browser, against the real server over a real database."""

import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import uvicorn

from app.db.session import transaction
from app.domain.messages import Progress, StepMetrics
from app.domain.scopes import Scope
from app.main import create_app
from app.services.keys import create_key
from app.services.monitoring import record_evaluation
from app.services.progress import record_point, save_progress
from tests.app.web.browser import Browser, find_chromium
from tests.factories import make_model_version, make_project
from tests.histories import evaluated, save_checkpoint, start_job

CHROMIUM = find_chromium()
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")

MARKUP = "<img src=x onerror=document.title='owned'>"


@pytest.fixture
def address(settings, committed_factory) -> Iterator[str]:
    """The whole application on a free port of this machine."""
    app = create_app(settings, committed_factory)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        until = time.monotonic() + 20
        while not server.started and time.monotonic() < until:
            time.sleep(0.02)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        server.should_exit = True
        thread.join(20)


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """One browser for all; every test has its own port, so its own storage."""
    assert CHROMIUM is not None
    with Browser(CHROMIUM, tmp_path_factory.mktemp("chromium")) as browser:
        yield browser


@pytest.fixture
def browser(chromium: Browser) -> Iterator[Browser]:
    chromium.console.clear()
    yield chromium
    chromium.open("about:blank")


def sign_in(browser: Browser, address: str, key: str, page: str = "") -> None:
    browser.open(f"{address}/{page}")
    browser.wait_for("document.querySelector('#key')")
    browser.evaluate(f"document.querySelector('#key').value = {key!r}")
    browser.evaluate("document.querySelector('.sign-in button').click()")


def text(browser: Browser, selector: str = "main") -> str:
    found: str = browser.evaluate(f"document.querySelector({selector!r}).innerText")
    return found


def dots(browser: Browser, series: str) -> int:
    found: int = browser.evaluate(
        f"document.querySelectorAll('.panel-loss .series{series} .dot').length"
    )
    return found


def seed(factory) -> tuple[str, str]:
    """A running job that was rolled back once, and a key of its project."""
    with transaction(factory) as session:
        job, versions = start_job(session)
        job.suffix = MARKUP
        save_checkpoint(session, job, 30)
        record_point(session, job.id, 1, evaluated(versions, valid_loss=0.7))
        save_checkpoint(session, job, 60)
        record_point(session, job.id, 1, evaluated(versions, 60, lost=300, valid_loss=0.6))
        save_checkpoint(session, job, 60, branch=1)
        record_evaluation(session, job.id, 1, evaluated(versions, 60, branch=1))
        metrics = StepMetrics(
            step=60,
            branch=1,
            train_loss=0.5,
            train_mean_token_accuracy=0.9,
            learning_rate=1e-3,
            tokens=64,
            seconds=0.1,
        )
        save_progress(
            session,
            job.id,
            1,
            Progress(
                id=9,
                branch=1,
                step=60,
                total_steps=120,
                seconds_remaining=75.0,
                trained_tokens=3840,
                phase="training",
                metrics=(metrics,),
            ),
            worker_id=job.worker_id,
            ttl=60,
        )
        make_model_version(session, job, name="ft:tiny:p::0badcafe", retention="unproven")
        key = create_key(session, project_id=job.project_id, name="k").text
        return f"ftjob-{job.id.hex}", key


def test_a_job_is_shown_with_its_drops_its_rollback_and_its_log(
    browser, address, committed_factory
) -> None:
    job_id, key = seed(committed_factory)
    sign_in(browser, address, key)
    browser.wait_for("document.querySelector('tbody tr')")
    row = text(browser, "tbody tr")
    for word in (MARKUP, "running", "60 / 120 steps", "1 min 1", "s left", "ewc", "1 → 4", "pass"):
        assert word in row

    browser.evaluate("document.querySelector('tbody a').click()")
    browser.wait_for("document.querySelector('.panel-drop svg')")
    assert browser.evaluate("location.hash") == f"#/jobs/{job_id}"
    shown = text(browser)
    for word in ("25.0 %", "back to step 30", "ewc 1 → 4", "superseded", "limit 3.00%"):
        assert word in shown
    chart: dict[str, Any] = browser.evaluate(
        """(() => { const at = document.querySelector('.panel-drop svg'); const n = (s) => at.querySelectorAll(s).length;
        return { lines: n('.series'), dots: n('.dot'), marks: n('.mark'), links: n('.link'), limits: n('.limit'), whiskers: n('.whisker') }; })()"""
    )
    assert chart == {
        "lines": 2,
        "dots": 2,
        "marks": 1,
        "links": 1,
        "limits": 1,
        "whiskers": 9,
    }
    # of the validation losses at 30 and 60 the rollback to 30 undid the second
    assert dots(browser, ".valid:not(.left-behind)") == 1
    assert dots(browser, ".valid.left-behind") == 1
    assert "training loss" not in text(browser, ".log")
    browser.evaluate("document.querySelector('.switch input').click()")
    browser.wait_for("document.querySelector('.log').innerText.includes('training loss=0.5000')")
    # markup from the server stays text, and nothing broke the policy
    assert browser.evaluate("document.querySelectorAll('main img').length") == 0
    assert browser.evaluate("document.title").startswith("<img")
    assert browser.console == []


def test_what_changes_on_the_server_appears_by_itself(browser, address, committed_factory) -> None:
    job_id, key = seed(committed_factory)
    sign_in(browser, address, key, f"#/jobs/{job_id}")
    browser.wait_for("document.querySelector('.panel-summary .chip')")
    assert text(browser, ".panel-summary .chip") == "running"
    browser.evaluate("document.querySelector('.panel-decisions').dataset.seen = 'yes'")
    browser.evaluate(
        f"fetch('/v1/fine_tuning/jobs/{job_id}/cancel', {{ method: 'POST', headers:"
        f" {{ authorization: 'Bearer {key}' }} }}).then((r) => r.status)"
    )
    browser.wait_for(
        "document.querySelector('.panel-summary').innerText.includes('cancel requested')"
    )
    browser.wait_for("document.querySelector('.log').innerText.includes('Cancellation requested.')")
    # what did not change was not drawn again
    assert browser.evaluate("document.querySelector('.panel-decisions').dataset.seen") == "yes"


def test_models_are_listed_with_their_word_on_retention(
    browser, address, committed_factory
) -> None:
    _, key = seed(committed_factory)
    sign_in(browser, address, key, "#/models")
    browser.wait_for("document.querySelector('.panel-versions tbody tr')")
    versions = text(browser, ".panel-versions tbody")
    assert "ft:tiny:p::0badcafe" in versions
    assert "unproven" in versions
    assert "tiny-" in text(browser, ".panel-bases tbody")


def test_a_refused_key_is_asked_for_again_and_forgotten(browser, address) -> None:
    sign_in(browser, address, "rt_live_aaaaaaaa_" + "x" * 43)
    browser.wait_for("!document.querySelector('#notice').hidden")
    assert "retain keys create" in text(browser, "#notice")
    assert browser.evaluate("document.querySelector('#key') !== null")
    assert browser.evaluate("sessionStorage.length + localStorage.length") == 0


def test_a_project_without_jobs_is_told_how_to_submit_one(
    browser, address, committed_factory
) -> None:
    with transaction(committed_factory) as session:
        key = create_key(session, project_id=make_project(session).id, name="k").text
    sign_in(browser, address, key)
    browser.wait_for("document.querySelector('.empty')")
    assert "retain jobs submit" in text(browser)
    browser.evaluate("document.querySelector('#forget').click()")
    browser.wait_for("document.querySelector('#key')")
    assert browser.evaluate("sessionStorage.length") == 0


def test_a_key_without_the_scope_and_an_unknown_job_are_explained(
    browser, address, committed_factory
) -> None:
    with transaction(committed_factory) as session:
        project = make_project(session)
        narrow = create_key(
            session, project_id=project.id, name="narrow", scopes=[Scope.FILES_READ]
        ).text
        wide = create_key(session, project_id=project.id, name="wide").text
    sign_in(browser, address, narrow)
    browser.wait_for("document.querySelector('#notice').innerText.includes('jobs:read')")
    browser.evaluate("document.querySelector('#forget').click()")
    sign_in(browser, address, wide, "#/jobs/ftjob-" + "0" * 32)
    browser.wait_for("document.querySelector('#notice').innerText.includes('another project')")


@pytest.mark.parametrize("dark", [False, True])
def test_a_narrow_window_shows_everything_without_sideways_scrolling(
    browser, address, committed_factory, dark
) -> None:
    job_id, key = seed(committed_factory)
    sign_in(browser, address, key)
    browser.wait_for("document.querySelector('tbody tr')")
    for page in ("#/jobs", f"#/jobs/{job_id}", "#/models"):
        browser.open(f"{address}/{page}", width=400, dark=dark)
        browser.wait_for("document.querySelector('tbody tr')")
        assert browser.evaluate("document.documentElement.scrollWidth <= innerWidth"), page
    background = browser.evaluate("getComputedStyle(document.body).backgroundColor")
    assert background == ("rgb(16, 19, 25)" if dark else "rgb(245, 246, 248)")


def test_the_page_of_operations_draws_itself_from_the_document(browser, address, tmp_path) -> None:
    browser.open(f"{address}/docs#fine_tuning_create_job")
    browser.wait_for("document.querySelectorAll('details.operation').length > 80", seconds=60)
    shown = text(browser, "#fine_tuning_create_job")
    assert '"training_file"' in shown
    assert "fine_tuning_cancel_job" in shown  # a link
    assert "idempotent-replayed" in shown
    browser.evaluate("document.querySelector('#find').value = 'cancel'")
    browser.evaluate("document.querySelector('#find').dispatchEvent(new Event('input'))")
    found = browser.evaluate(
        "[...document.querySelectorAll('details.operation:not([hidden]) summary')].map((s) => s.innerText).join()"
    )
    assert "/v1/fine_tuning/jobs/{fine_tuning_job_id}/cancel" in found
    assert "/v1/models" not in found
    assert browser.console == []
    browser.evaluate("document.querySelector('#find').value = ''")
    browser.picture(tmp_path / "docs.png")
