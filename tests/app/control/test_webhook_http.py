"""Where a webhook's connection really goes, and whose certificate it accepts."""

import asyncio
import ssl
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpcore
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from app.control.webhook_http import GuardedBackend, Reply, Resolver, WebhookClient
from app.control.webhook_streams import connect
from tests.app.control.receivers import Receiver, receiving

PUBLIC = "93.184.216.34"


def answering(*answers: list[str]) -> tuple[Resolver, list[str]]:
    """A resolver that gives one answer after the other, and the names it was asked for."""
    asked: list[str] = []

    async def resolver(host: str, _port: int) -> list[str]:
        asked.append(host)
        return answers[min(len(asked), len(answers)) - 1]

    return resolver, asked


class Wire:
    """The network's place: notes the address, and connects to the receiver instead of the internet."""

    def __init__(self) -> None:
        self.addresses: list[str] = []

    async def connect(
        self, address: str, port: int, seconds: float | None
    ) -> httpcore.AsyncNetworkStream:
        self.addresses.append(address)
        return await connect("127.0.0.1", port, seconds)


def post(client: WebhookClient, url: str) -> Reply:
    async def once() -> Reply:
        try:
            return await client.post(url, {"webhook-id": "evt_1"}, b"{}")
        finally:
            await client.aclose()

    return asyncio.run(once())


def make_certificates(directory: Path, host: str) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """A server that is this host, and a client that trusts who says so."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, host)])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(host)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = certificate.public_bytes(serialization.Encoding.PEM)
    private = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    (directory / "chain.pem").write_bytes(pem + private)
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(directory / "chain.pem")
    return server, ssl.create_default_context(cadata=pem.decode())


@pytest.fixture
def certificates(tmp_path: Path) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    return make_certificates(tmp_path, "hook.test")


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as running:
        yield running


def test_a_name_that_changes_its_mind_changes_nothing(receiver: Receiver) -> None:
    wire = Wire()
    resolver, asked = answering([PUBLIC], ["127.0.0.1"])
    client = WebhookClient(allow_private=False, resolver=resolver, connector=wire.connect)
    url = receiver.url.replace("127.0.0.1", "rebinding.test")
    assert post(client, url).status == 200
    assert (asked, wire.addresses) == (["rebinding.test"], [PUBLIC])
    assert receiver.requests[0][0]["host"].startswith("rebinding.test:")


@pytest.mark.parametrize(
    "addresses",
    [["127.0.0.1"], [PUBLIC, "127.0.0.1"], ["::1"], ["64:ff9b::a9fe:a9fe"], ["fe80::1%1"]],
)
def test_one_private_answer_refuses_the_name(receiver: Receiver, addresses: list[str]) -> None:
    resolver, _ = answering(addresses)
    client = WebhookClient(allow_private=False, resolver=resolver)
    reply = post(client, receiver.url.replace("127.0.0.1", "mixed.test"))
    assert reply.status is None
    assert reply.error is not None
    assert "is not public" in reply.error
    assert receiver.requests == []


def test_the_certificate_is_checked_against_the_urls_name(
    certificates: tuple[ssl.SSLContext, ssl.SSLContext],
) -> None:
    server, trusting = certificates
    resolver, _ = answering(["127.0.0.1"])
    with receiving(context=server) as receiver:
        for name, is_right in (("hook.test", True), ("other.test", False)):
            client = WebhookClient(allow_private=True, resolver=resolver, ssl_context=trusting)
            reply = post(client, receiver.url.replace("127.0.0.1", name))
            assert (reply.status == 200) is is_right, reply
        distrusting = WebhookClient(allow_private=True, resolver=resolver)
        reply = post(distrusting, receiver.url.replace("127.0.0.1", "hook.test"))
        assert reply.error is not None
        assert "certificate" in reply.error.lower()
    assert len(receiver.requests) == 1


def test_the_second_address_is_tried_when_the_first_is_closed(receiver: Receiver) -> None:
    resolver, _ = answering(["127.0.0.3", "127.0.0.1"])
    client = WebhookClient(allow_private=True, resolver=resolver)
    assert post(client, receiver.url.replace("127.0.0.1", "two.test")).status == 200


def test_names_that_lead_nowhere_are_failures_not_crashes() -> None:
    async def no_such_name(_host: str, _port: int) -> list[str]:
        raise OSError("no such name")

    nothing, _ = answering([])
    for resolver in (no_such_name, nothing):
        reply = post(WebhookClient(allow_private=True, resolver=resolver), "http://none.test/")
        assert reply.status is None
        assert reply.error is not None


def test_proxies_of_the_environment_are_not_used(
    receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert post(WebhookClient(allow_private=True), receiver.url).status == 200


def test_sockets_of_the_file_system_are_refused() -> None:
    backend = GuardedBackend(allow_private=True)
    with pytest.raises(Exception, match="not a network address"):
        asyncio.run(backend.connect_unix_socket("/run/docker.sock"))
