"""Row F33: what attackers send gets a 4xx at once, costs little memory, and nobody else waits for it."""

import gzip
import json
import socket
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from urllib.parse import urlsplit

import httpx
import pytest

from tests.faults.fleet import measured
from tests.fuzz.server import Target, running_target

MEBI = 2**20
MAX_GROWN = 200 * MEBI
MAX_P99_SECONDS = 2.0
CHAT = b'{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}\n'


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    with running_target(tmp_path_factory.mktemp("hostile")) as running:
        yield running


class Bystander:
    """Another client of the same process: how long its requests take, and what memory the process holds meanwhile."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.seconds: list[float] = []
        self.statuses: set[int] = set()
        self.before = self.peak = target.resident_bytes()

    def __enter__(self) -> "Bystander":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    @property
    def p99(self) -> float:
        assert len(self.seconds) > 1, "nobody else got through"
        return statistics.quantiles(self.seconds, n=100, method="inclusive")[98]

    def _run(self) -> None:
        headers = {"authorization": f"Bearer {self._target.key}"}
        with httpx.Client(base_url=self._target.url, headers=headers, timeout=30) as client:
            while not self._stop.is_set():
                began = time.monotonic()
                self.statuses.add(client.get("/v1/files", params={"limit": 1}).status_code)
                self.seconds.append(time.monotonic() - began)
                self.peak = max(self.peak, self._target.resident_bytes())
                time.sleep(0.01)


@pytest.fixture
def bystander(target: Target) -> Iterator[Bystander]:
    """Watches while a test attacks; afterwards nothing has failed, grown or waited."""
    logged = len(target.log.read_bytes())
    with Bystander(target) as watching:
        yield watching
        time.sleep(0.5)
    assert watching.statuses == {200}
    assert watching.peak - watching.before < MAX_GROWN, (watching.peak - watching.before) / MEBI
    assert watching.p99 < MAX_P99_SECONDS
    assert b"Traceback" not in target.log.read_bytes()[logged:]
    measured(
        "F33",
        others_p99_s=watching.p99,
        grown_mib=(watching.peak - watching.before) / MEBI,
        others=len(watching.seconds),
    )


@pytest.fixture
def client(target: Target) -> Iterator[httpx.Client]:
    headers = {"authorization": f"Bearer {target.key}"}
    with httpx.Client(base_url=target.url, headers=headers, timeout=60) as client:
        yield client


DEEP = {
    "lists": b"[" * 100_000,
    "closed": b"[" * 400_000 + b"]" * 400_000,
    "objects": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "behind a known field": b'{"model": "llama", "metadata": '
    + b'{"a":' * 5000
    + b"1"
    + b"}" * 5001,
}
ODD = {
    "keys given twice": b'{"model": "a", "model": "b", "training_file": "x"}',
    "not a number": b'{"model": "a", "training_file": "x", "seed": NaN}',
    "endless": b'{"model": "a", "training_file": "x", "seed": -Infinity}',
    "integer of 100,000 digits": b'{"model": "a", "training_file": "x", "seed": ' + b"9" * 100_000 + b"}",
    "float beyond floats": b'{"model": "a", "training_file": "x", "training": {"learning_rate": 1e999999}}',
    "integer beyond 64 bits": b'{"model": "a", "training_file": "x", "seed": 18446744073709551616}',
    "NUL": b'{"model": "a\\u0000", "training_file": "x"}',
    "NUL as a byte": b'{"model": "a\x00", "training_file": "x"}',
    "half a surrogate pair": b'{"model": "\\ud800", "training_file": "x"}',
    "not UTF-8": b'{"model": "\xff\xfe", "training_file": "x"}',
    "UTF-16": '{"model": "a"}'.encode("utf-16"),
    "a mark in front": b'\xef\xbb\xbf{"model": "a"}',
    "nothing": b"",
    "a word": b"null",
    "a list": b"[]",
    "cut off": b'{"model": "a", "training_fi',
    "a string of 2 MB": b'"' + b"a" * 2 * MEBI + b'"',
    "90,000 keys": b"{" + b",".join(b'"%d":1' % n for n in range(90_000)) + b"}",
}  # fmt: skip
ROUTES = ("/v1/fine_tuning/jobs", "/v1/benchmark_results", "/v1/webhook_endpoints", "/v1/runs")
PATHS = (
    "/v1/files/../../etc/passwd",
    "/v1/files/%2e%2e%2f%2e%2e%2fetc%2fpasswd",
    "/v1/files/%2e%2e%2f%2e%2e%2fetc%2fpasswd/content",
    "/assets/..%2f..%2fmain.py",
    "/assets/%2e%2e%2fpages.py",
    "/v1/models/..%2f..%2f..%2fetc%2fpasswd",
    "/v1/models/%00",
    "/v1/models/%ff%fe",
    "/v1/models/%ed%a0%80",
    "/v1/benchmarks/a%00b",
    "/v1/registered_models/%00/aliases/%ff",
    "/v1/files/" + "a" * 30_000,
    "//v1/files",
    "/v1/files/file-" + "%F0%9F%92%A9" * 500,
    "/v1/fine_tuning/jobs/ftjob-00000000000000000000000000000003/events?after=%00",
    "/v1/files?limit=99999999999999999999999999",
    "/v1/files?limit=1e309",
    "/v1/files?limit=NaN",
    "/v1/files?purpose=%00",
    "/v1/files?after=" + "f" * 20_000,
    "/v1/fine_tuning/jobs?metadata[%00]=%00",
    "/v1/fine_tuning/jobs?metadata[a]=%ed%a0%80",
    "/v1/benchmark_results?subject_id=%00&benchmark=%ff",
    "/v1/audit_log?since=99999999999999999999",
    "/v1/audit_log?actor=%00",
    "/v1/fine_tuning/jobs/ftjob-00000000000000000000000000000003?wait=1e400",
)


def check_refused(answer: httpx.Response, what: str) -> None:
    """A 4xx in the envelope, soon."""
    assert 400 <= answer.status_code < 500, (what, answer.status_code, answer.text[:300])
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}, what
    assert answer.elapsed.total_seconds() < MAX_P99_SECONDS, (what, answer.elapsed)
    assert len(answer.content) < 10_000, what


@pytest.mark.slow
@pytest.mark.parametrize("route", ROUTES)
def test_f33_bodies_that_readers_take_differently(
    client: httpx.Client, bystander: Bystander, route: str
) -> None:
    for what, body in (DEEP | ODD).items():
        headers = {"content-type": "application/json"}
        check_refused(client.post(route, content=body, headers=headers), what)


@pytest.mark.slow
def test_f33_paths_and_queries(target: Target, bystander: Bystander) -> None:
    """Sent as they are: a client would tidy them up."""
    for path in PATHS:
        status, body = raw_request(target, f"GET {path} HTTP/1.1".encode())
        assert status < 500, (path, body[:300])
        assert b"root:" not in body, path
        assert b"import " not in body, path


@pytest.mark.slow
def test_f33_headers(target: Target, bystander: Bystander) -> None:
    floods = {
        "10,000 headers": b"".join(b"x-h%d: v\r\n" % n for n in range(10_000)),
        "one header of 1 MB": b"x-h: " + b"v" * MEBI + b"\r\n",
        "1 MB of headers": b"x-h: vvvvvvvvvvvvvvvvvvvvvvvvvv\r\n" * 2**15,
        "a key that is no text": b"idempotency-key: \xff\xfe\r\n",
        "a key too long": b"idempotency-key: " + b"k" * 5000 + b"\r\n",
        "a false content length": b"content-length: -1\r\n",
        "two content lengths": b"content-length: 1\r\ncontent-length: 2\r\n",
        "both framings": b"content-length: 5\r\ntransfer-encoding: chunked\r\n",
        "an unknown encoding": b"content-encoding: br\r\ncontent-length: 0\r\n",
        "a NUL": b"x-h: a\x00b\r\n",
        "no colon": b"nonsense\r\n",
    }
    for what, headers in floods.items():
        status, body = raw_request(target, b"GET /v1/files HTTP/1.1", headers)
        assert status < 500, (what, body[:300])


@pytest.mark.slow
def test_f33_bodies_without_end(target: Target, bystander: Bystander) -> None:
    """What counts is what arrives: an announced 10 GB, and chunks for as long as the server takes them."""
    form = b"multipart/form-data; boundary=b"
    start = b'--b\r\ncontent-disposition: form-data; name="file"; filename="f"\r\n\r\n'
    for path, kind in (("/v1/files", form), ("/v1/fine_tuning/jobs", b"application/json")):
        line = f"POST {path} HTTP/1.1".encode()
        head = b"content-type: " + kind + b"\r\n"
        announced = head + b"content-length: 10737418240\r\n"
        status, _ = raw_request(target, line, announced, pieces=(b"a" * MEBI for _ in range(8)))
        assert status in {0, 400, 413}, path
        piece = b"%x\r\n" % MEBI + b"a" * MEBI + b"\r\n"
        chunks = (piece if n else b"%x\r\n%s\r\n" % (len(start), start) for n in range(1400))
        chunked = head + b"transfer-encoding: chunked\r\n"
        status, _ = raw_request(target, line, chunked, pieces=chunks)
        assert status in {0, 413}, path


@pytest.mark.slow
def test_f33_files_that_unpack_to_much_more(
    client: httpx.Client, target: Target, bystander: Bystander
) -> None:
    zeros = gzip.compress(b"\0" * 64 * MEBI, 9)
    bombs = {
        "a file of zeros": zeros,
        "twice": gzip.compress(zeros, 9),
        "rows": gzip.compress(CHAT * 200_000, 9),
        "many members": gzip.compress(b"") * 20_000,
        "cut off": zeros[: len(zeros) // 2],
        "a header alone": b"\x1f\x8b\x08\x00",
    }
    for what, bomb in bombs.items():
        files = {"file": ("f.jsonl.gz", bomb)}
        check_refused(client.post("/v1/files", files=files, data={"purpose": "fine-tune"}), what)
        request = client.build_request(
            "POST", "/v1/files", files={"file": ("f", b"\0" * 8 * MEBI)}, data={"purpose": "evals"}
        )
        packed = gzip.compress(request.read(), 9)
        headers = {"content-type": request.headers["content-type"], "content-encoding": "gzip"}
        check_refused(client.post("/v1/files", content=packed, headers=headers), "packed body")
    scratch = target.log.parent / "data" / "scratch" / "uploads"
    assert list(scratch.glob("*")) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "row",
    [
        b'{"messages": [{"role": "user", "role": "user", "content": "q"}]}\n',
        b'{"text": "a\\u0000"}\n',
        b'{"text": "\\udfff"}\n',
        b'{"text": ' + b"[" * 10_000 + b"]" * 10_000 + b"}\n",
        b'{"text": "' + b"a" * (2 * MEBI) + b'"}\n',
        b'{"text": "a", "weight": 1e400}\n',
        b"\x00\x00\x00\x00",
        b"PK\x03\x04" + b"\x00" * 100,
        b"PAR1" + b"\xff" * 100 + b"PAR1",
        b"[" * 1000,
    ],
    ids=[
        "twice",
        "nul",
        "surrogate",
        "deep",
        "long",
        "huge",
        "zeros",
        "zip",
        "parquet",
        "brackets",
    ],
)
def test_f33_rows(client: httpx.Client, bystander: Bystander, row: bytes) -> None:
    names = ("f.jsonl", "../../../etc/passwd", "a\x00b", "\u202ef.jsonl", "x" * 5000)
    for name in names:
        files = {"file": (name, CHAT + row)}
        check_refused(client.post("/v1/files", files=files, data={"purpose": "fine-tune"}), name)


@pytest.mark.slow
def test_f33_clients_that_take_their_time(target: Target, bystander: Bystander) -> None:
    """Two hundred that send a byte now and then hold nobody up."""
    place = address(target)
    with ExitStack() as stack:
        slow = [stack.enter_context(socket.create_connection(place)) for _ in range(200)]
        request = b"POST /v1/files HTTP/1.1\r\nhost: x\r\ncontent-length: 100000\r\n\r\n"
        for at in range(60):
            for each in slow:
                each.sendall(request[at : at + 1])
            time.sleep(0.05)
        for each in slow:
            each.sendall(request[60:] + b"--b")
        time.sleep(2)


def address(target: Target) -> tuple[str, int]:
    parts = urlsplit(target.url)
    assert parts.hostname is not None
    assert parts.port is not None
    return parts.hostname, parts.port


def raw_request(
    target: Target, line: bytes, headers: bytes = b"", *, pieces: Iterator[bytes] | None = None
) -> tuple[int, bytes]:
    """A status and a body for bytes as they are; 0 when the server hung up without an answer."""
    head = b"\r\nhost: x\r\nconnection: close\r\nauthorization: Bearer " + target.key.encode()
    with closing(socket.create_connection(address(target), timeout=60)) as connection:
        try:
            connection.sendall(line + head + b"\r\n" + headers + b"\r\n")
            for piece in pieces or ():
                connection.sendall(piece)
            connection.shutdown(socket.SHUT_WR)
        except (BrokenPipeError, ConnectionResetError):
            pass  # it has had enough
        answer = bytearray()
        try:
            while piece := connection.recv(2**16):
                answer += piece
        except ConnectionResetError:
            pass
    if not answer.startswith(b"HTTP/1.1 "):
        return 0, bytes(answer)
    status, body = int(answer[9:12]), bytes(answer).partition(b"\r\n\r\n")[2]
    if status >= 500:
        return status, body
    if body and b"application/json" in answer:
        json.loads(body)  # whole
    return status, body
