"""The page and its assets as they go out: policy, types, revalidation, and nothing foreign in them."""

import re
from importlib.resources import files

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from app.main import create_app
from app.web import CONTENT_SECURITY_POLICY, build_router

PACKAGE = files("app.web")
ASSETS = sorted(entry.name for entry in (PACKAGE / "assets").iterdir())


@pytest.fixture
def client() -> TestClient:
    app = FastAPI(docs_url=None)
    app.include_router(build_router())
    return TestClient(app)


def test_the_page_goes_out_with_the_strict_policy(client) -> None:
    answer = client.get("/")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    policy = dict(
        part.strip().split(" ", 1) for part in answer.headers["content-security-policy"].split(";")
    )
    assert policy == {
        "default-src": "'none'",
        "script-src": "'self'",
        "style-src": "'self'",
        "connect-src": "'self'",
        "img-src": "'self' data:",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["referrer-policy"] == "no-referrer"


@pytest.mark.parametrize("path", ["/", "/docs"])
def test_a_page_has_no_inline_script_or_style_and_names_only_its_own_assets(client, path) -> None:
    page = client.get(path).text
    assert re.findall(r"<script[^>]*>(.*?)</script>", page, re.S) == [""]
    assert not re.search(r"<style|\sstyle=|\son\w+=|://", page)
    named = set(re.findall(r'(?:src|href)="(/[^"]*)"', page)) - {"/openapi.json"}
    assert named
    for address in named:
        assert client.get(address).status_code == 200, address


@pytest.mark.parametrize("name", ASSETS)
def test_every_asset_is_served_with_its_type_and_policy(client, name) -> None:
    answer = client.get(f"/assets/{name}")
    assert answer.status_code == 200
    assert answer.content == (PACKAGE / "assets" / name).read_bytes()
    kinds = {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
    assert answer.headers["content-type"].startswith(kinds[name[name.rindex(".") :]])
    assert answer.headers["content-security-policy"] == CONTENT_SECURITY_POLICY


@pytest.mark.parametrize("name", [name for name in ASSETS if name.endswith(".js")])
def test_scripts_import_their_neighbours_alone_and_never_parse_markup(name) -> None:
    source = (PACKAGE / "assets" / name).read_text()
    for imported in re.findall(r'\bfrom "([^"]+)"', source):
        assert imported.removeprefix("./") in ASSETS
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", source)
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", source)


def test_an_unchanged_asset_is_answered_304(client) -> None:
    first = client.get("/assets/dashboard.js")
    assert first.headers["cache-control"] == "no-cache"
    again = client.get("/assets/dashboard.js", headers={"if-none-match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    other = client.get("/assets/dashboard.js", headers={"if-none-match": '"other"'})
    assert other.content == first.content


@pytest.mark.parametrize("name", ["nothing.js", "..%2Fpages.py", "%2Fetc%2Fpasswd"])
def test_what_is_no_asset_is_a_404_of_the_api(settings, session_factory, name) -> None:
    client = TestClient(create_app(settings, session_factory))
    answer = client.get(f"/assets/{name}")
    assert answer.status_code == 404
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_the_server_keeps_the_pages_own_policy(settings, session_factory) -> None:
    client = TestClient(create_app(settings, session_factory))
    answer = client.get("/")
    assert answer.headers["content-security-policy"] == CONTENT_SECURITY_POLICY
    assert answer.headers["cache-control"] == "no-cache"
