"""Files and uploads through the official openai client, over a real port and real commits."""

import gzip
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import openai
import pytest

from app.db.session import SessionFactory, transaction
from app.services.keys import create_key
from app.settings import Settings
from tests.factories import make_base_model, make_file, make_project
from tests.serving import serving

ROWS = [
    {"messages": [{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": "a"}]}
    for n in range(200)
]
BODY = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


class Stand(NamedTuple):
    """Clients of two projects."""

    client: openai.OpenAI
    rival: openai.OpenAI
    settings: Settings


@pytest.fixture
def stand(committed_factory: SessionFactory, settings: Settings) -> Iterator[Stand]:
    with serving(settings, committed_factory) as address:
        clients = []
        for name in ("acme", "rival"):
            with transaction(committed_factory) as session:
                project = make_project(session, name=name)
                key = create_key(session, project_id=project.id, name="client").text
            clients.append(openai.OpenAI(base_url=f"{address}/v1", api_key=key, max_retries=0))
        with transaction(committed_factory) as session:
            make_base_model(session, name="tiny", general_file_id=make_file(session).id)
        try:
            yield Stand(clients[0], clients[1], settings)
        finally:
            for client in clients:
                client.close()


def upload(client: openai.OpenAI, body: bytes = BODY, **fields: Any) -> Any:
    return client.files.create(file=("rows.jsonl", body), purpose="fine-tune", **fields)


def test_every_file_comes_once_over_pages_in_either_order(stand: Stand) -> None:
    made = [upload(stand.client).id for _ in range(5)]
    item = json.dumps({"question": "q", "answer": "a"}).encode()
    other = stand.client.files.create(file=("i.jsonl", item), purpose="evals").id
    files = stand.client.files
    assert [f.id for f in files.list(limit=2)] == [other, *made[::-1]]
    assert [f.id for f in files.list(limit=2, order="asc")] == [*made, other]
    assert [f.id for f in files.list(limit=2, order="asc", purpose="fine-tune")] == made
    assert [f.id for f in files.list(purpose="evals")] == [other]
    assert [f.id for f in files.list(after=made[1])] == [made[0]]
    page = files.list(limit=4)
    assert (len(page.data), page.has_more) == (4, True)
    assert list(stand.rival.files.list()) == []
    with pytest.raises(openai.NotFoundError):
        stand.rival.files.list(after=made[0])


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ({"limit": 0}, "limit"),
        ({"limit": 10_001}, "limit"),
        ({"limit": "x"}, "limit"),
        ({"order": "up"}, "order"),
    ],
)
def test_a_bad_page_is_refused_by_name(stand: Stand, query: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        stand.client.files.list(extra_query=query)
    assert refused.value.param == param


def test_expiry_is_shown_and_its_bounds_hold(stand: Stand) -> None:
    file = upload(stand.client, expires_after={"anchor": "created_at", "seconds": 7200})
    assert file.expires_at is not None
    assert file.expires_at - file.created_at in {7199, 7200}
    assert upload(stand.client).expires_at is None
    for seconds in (3599, 2_592_001):
        with pytest.raises(openai.BadRequestError) as refused:
            upload(stand.client, expires_after={"anchor": "created_at", "seconds": seconds})
        assert refused.value.param == "expires_after.seconds"
    anchor: Any = "last_active_at"
    with pytest.raises(openai.BadRequestError) as refused:
        upload(stand.client, expires_after={"anchor": anchor, "seconds": 3600})
    assert refused.value.param == "expires_after.anchor"


def test_a_file_in_use_is_a_conflict_that_names_the_job(stand: Stand) -> None:
    file = upload(stand.client)
    job = stand.client.fine_tuning.jobs.create(model="tiny", training_file=file.id)
    eager = stand.client.with_options(max_retries=5)
    with pytest.raises(openai.ConflictError) as refused:
        eager.files.delete(file.id)
    assert (refused.value.code, refused.value.param) == ("file_in_use", "file_id")
    assert job.id in refused.value.message
    assert refused.value.response.headers["x-should-retry"] == "false"
    stand.client.fine_tuning.jobs.cancel(job.id)
    assert stand.client.files.delete(file.id).deleted


def test_a_large_file_goes_up_in_chunks(stand: Stand, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(BODY)
    done = stand.client.uploads.upload_file_chunked(
        file=path,
        mime_type="text/jsonl",
        purpose="fine-tune",
        part_size=1000,
        md5=hashlib.md5(BODY).hexdigest(),
    )
    assert (done.status, done.bytes, done.filename) == ("completed", len(BODY), "rows.jsonl")
    assert done.file is not None
    assert stand.client.files.content(done.file.id).read() == BODY
    job = stand.client.fine_tuning.jobs.create(model="tiny", training_file=done.file.id)
    assert job.training_file == done.file.id
    packed = gzip.compress(BODY)
    small = stand.client.uploads.upload_file_chunked(
        file=packed,
        filename="rows.jsonl.gz",
        bytes=len(packed),
        mime_type="application/gzip",
        purpose="fine-tune",
    )
    assert small.file is not None
    assert stand.client.files.content(small.file.id).read() == BODY


def test_an_upload_by_hand_resumed_cancelled_and_read_strictly(stand: Stand) -> None:
    strict = openai.OpenAI(
        base_url=stand.client.base_url,
        api_key=stand.client.api_key,
        max_retries=0,
        _strict_response_validation=True,
    )
    made = strict.uploads.create(
        bytes=len(BODY), filename="f.jsonl", mime_type="text/jsonl", purpose="fine-tune"
    )
    assert (made.status, made.file, made.expires_at - made.created_at) == ("pending", None, 3600)
    part = strict.uploads.parts.create(made.id, data=BODY[:300])
    assert (part.object, part.upload_id) == ("upload.part", made.id)
    shown: Any = strict.get(f"/uploads/{made.id}", cast_to=object)  # as a sender that was cut off
    assert [found["id"] for found in shown["parts"]] == [part.id]
    start = sum(found["bytes"] for found in shown["parts"])
    rest = strict.uploads.parts.create(made.id, data=BODY[start:])
    with pytest.raises(openai.BadRequestError) as refused:
        strict.uploads.complete(made.id, part_ids=[rest.id, part.id], md5="0" * 32)
    assert refused.value.param == "md5"
    for call in (strict.uploads.cancel, stand.client.uploads.cancel):
        assert call(made.id).status == "cancelled"
    with pytest.raises(openai.ConflictError):
        strict.uploads.complete(made.id, part_ids=[part.id, rest.id])
    with pytest.raises(openai.NotFoundError):
        stand.rival.uploads.parts.create(made.id, data=b"x")
    strict.close()


def test_a_conversion_reads_as_a_field_of_the_file(stand: Stand) -> None:
    rows = [{"instruction": "i", "output": "o"}, {"instruction": "", "output": "o"}]
    file = upload(stand.client, json.dumps(rows).encode())
    assert file.model_extra is not None
    conversion = file.model_extra["conversion"]
    assert (conversion["num_kept"], conversion["dropped"][0]["line"]) == (1, 2)
    assert conversion["preview"][0]["messages"][1] == {"role": "assistant", "content": "o"}
