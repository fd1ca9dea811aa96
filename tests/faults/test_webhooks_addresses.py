"""F30 and F31: whatever a receiver's URL, name or redirect says, nothing private is called."""

import asyncio
import ssl
import time
from collections.abc import Iterator
from pathlib import Path

import httpcore
import pytest

from app.control.webhook_http import Reply, WebhookClient, resolve
from app.control.webhook_streams import connect
from app.domain.addresses import is_public_address, is_public_host
from app.errors import BadRequest
from app.services.webhooks import check_url
from tests.app.control.receivers import Receiver, receiving, status
from tests.app.control.test_webhook_http import Wire, answering, make_certificates, post

METADATA = "http://169.254.169.254/latest/meta-data/"
PUBLIC = "93.184.216.34"

#: Addresses that lead inside, by the way in which they hide it.
INSIDE = {
    "loopback": ("127.0.0.1", "127.255.255.254", "::1", "0.0.0.0", "::"),
    "private": ("10.1.2.3", "172.16.0.1", "172.31.255.255", "192.168.0.1", "fc00::1", "fdff::1"),
    "link-local": ("169.254.169.254", "fe80::1", "fe80::1%eth0", "febf::1"),
    "carrier": ("100.64.0.1", "100.127.255.255"),
    "clouds": ("168.63.129.16", "100.100.100.200", "192.0.0.192", "fd00:ec2::254"),
    "mapped": ("::ffff:127.0.0.1", "::ffff:169.254.169.254", "::ffff:7f00:1", "::ffff:10.0.0.1"),
    "translated": ("::ffff:0:127.0.0.1", "::ffff:0:a9fe:a9fe"),
    "compatible": ("::127.0.0.1", "::169.254.169.254", "::8.8.8.8", "::7f00:1"),
    "nat64": ("64:ff9b::a9fe:a9fe", "64:ff9b::7f00:1", "64:ff9b:1::a9fe:a9fe"),
    "6to4": ("2002:a9fe:a9fe::1", "2002:7f00:1::", "2002:a00:1::1", "192.88.99.1"),
    "teredo": ("2001::1", "2001:0:a9fe:a9fe::1", "2001:0:4136:e378:8000:63bf:80ff:fffe"),
    "site-local": ("fec0::1", "feff::1"),
    "multicast": ("224.0.0.1", "239.255.255.250", "ff02::1", "ff0e::1"),
    "reserved": ("240.0.0.1", "255.255.255.255", "192.0.0.8", "198.18.0.1", "0.1.2.3"),
    "documentation": ("192.0.2.1", "198.51.100.1", "203.0.113.1", "2001:db8::1", "3fff::1"),
    "other": ("100::1", "5f00::1", "2001:10::1", "2001:20::1", "4000::1"),
}
#: Hosts that resolvers take for an address, in notations that a comparison of text would miss.
DISGUISED = (
    *("2130706433", "0x7f000001", "0X7F.1", "0177.0.0.1", "127.1", "127.0.1", "017700000001"),
    *("2852039166", "0xa9fea9fe", "0251.0376.0251.0376", "169.254.43518", "0", "00", "0x0"),
    *("127.0.0.1.", "localhost", "LOCALHOST", "localhost.", "metadata.localhost"),
)
#: What `getaddrinfo` itself takes for loopback: the check comes after it, so no notation gets through.
RESOLVED = ("2130706433", "0x7f000001", "0177.0.0.1", "127.1", "localhost")
CIRCLED = ("①②⑦.⓪.⓪.①", "127。0。0。1")
OUTSIDE = ("8.8.8.8", PUBLIC, "1.1.1.1", "2606:4700::1111", "2a00:1450::1", "::ffff:8.8.8.8")


@pytest.fixture
def sink() -> Iterator[Receiver]:
    """What must stay silent."""
    with receiving(host="127.0.0.2") as running:
        yield running


@pytest.mark.parametrize("way", sorted(INSIDE))
def test_f30_addresses_that_lead_inside_are_refused(way: str) -> None:
    for address in INSIDE[way]:
        assert not is_public_address(address), address
        host = f"[{address}]" if ":" in address else address
        with pytest.raises(BadRequest):
            check_url(f"https://{host}/", allow_private=False)


def test_f30_addresses_of_the_internet_are_called() -> None:
    for address in OUTSIDE:
        assert is_public_address(address), address
    for name in ("example.org", "hooks.example.org.", "x1.example", "1a.example.org", "xn--p1ai"):
        assert is_public_host(name), name


@pytest.mark.parametrize("host", DISGUISED)
def test_f30_disguised_hosts_are_refused_when_they_are_registered(host: str) -> None:
    with pytest.raises(BadRequest):
        check_url(f"https://{host}/", allow_private=False)


@pytest.mark.parametrize(
    "url",
    [
        *(
            "http://example.org/",
            "ftp://example.org/",
            "file:///etc/passwd",
            "gopher://example.org/",
        ),
        *("https://u@example.org/", "https://u:p@example.org/", "https://example.org@127.0.0.1/"),
        *("https://example.org:22/", "https://example.org:80/", "https://example.org:6379/"),
        *("https://example.org/#@127.0.0.1", "https://example.org\\@127.0.0.1/"),
        *("https://①②⑦.⓪.⓪.①/", "https://exa\tmple.org/", "https://[::1", "//example.org/"),
        *("https://example.org:0/", "https://%31%32%37.0.0.1/"),
    ],
)
def test_f30_urls_with_more_than_a_public_name_are_refused(url: str) -> None:
    with pytest.raises(BadRequest):
        check_url(url, allow_private=False)


def test_f30_no_notation_gets_past_the_resolver(sink: Receiver) -> None:
    port = sink.url.rpartition(":")[2]
    for host in RESOLVED:
        reply = post(WebhookClient(allow_private=False), f"http://{host}:{port}")
        assert reply.status is None, host
        assert reply.error is not None, host
    for host in CIRCLED:
        found = asyncio.run(resolve(host, 443))
        assert found, host
        assert not any(map(is_public_address, found)), host
        with pytest.raises(BadRequest):
            check_url(f"https://{host}/", allow_private=False)
    assert sink.requests == []


@pytest.mark.parametrize("way", sorted(INSIDE))
def test_f31_names_that_resolve_inside_are_refused(way: str, sink: Receiver) -> None:
    for address in INSIDE[way]:
        wire = Wire()
        resolver, _ = answering([PUBLIC, address])
        client = WebhookClient(allow_private=False, resolver=resolver, connector=wire.connect)
        reply = post(client, sink.url.replace("127.0.0.2", "hook.test"))
        assert "is not public" in (reply.error or ""), address
        assert wire.addresses == [], address
    assert sink.requests == []


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
def test_f30_redirects_inside_are_not_followed(code: int, sink: Receiver) -> None:
    for target in (METADATA, sink.url, "//127.0.0.2/", "gopher://127.0.0.2:6379/_FLUSHALL"):
        with receiving(status(code, Location=target)) as receiver:
            reply = post(WebhookClient(allow_private=True), receiver.url)
        assert (reply.status, reply.error) == (code, f"answered {code}")
        assert len(receiver.requests) == 1
    assert sink.requests == []


def test_f31_a_rebinding_name_is_called_at_the_address_that_was_checked(sink: Receiver) -> None:
    """Public at first, loopback from then on: each connection goes to what was checked for it, or nowhere."""
    wire = Wire()
    resolver, asked = answering([PUBLIC], ["127.0.0.2"])
    client = WebhookClient(allow_private=False, resolver=resolver, connector=wire.connect)

    async def talk(url: str) -> list[Reply]:
        try:
            replies = [await client.post(url, {"webhook-id": "evt_1"}, b"{}") for _ in range(2)]
            await asyncio.sleep(2.1)  # the idle connection is closed, so the name is resolved again
            return [*replies, await client.post(url, {"webhook-id": "evt_1"}, b"{}")]
        finally:
            await client.aclose()

    with receiving() as receiver:
        url = receiver.url.replace("127.0.0.1", "rebinding.test")
        first, second, third = asyncio.run(talk(url))
    assert (first.status, second.status) == (200, 200)
    assert "is not public" in (third.error or "")
    assert (asked, wire.addresses) == (["rebinding.test"] * 2, [PUBLIC])
    assert len(receiver.requests) == 2
    assert sink.requests == []


def test_f31_the_socket_goes_where_the_check_went(sink: Receiver) -> None:
    """As seen by the sockets themselves, with the real connector."""
    peers: list[str] = []

    async def noting(address: str, port: int, seconds: float | None) -> httpcore.AsyncNetworkStream:
        stream = await connect(address, port, seconds)
        peers.append(stream.get_extra_info("peername")[0])
        return stream

    with receiving() as receiver:
        resolver, asked = answering(["127.0.0.1"], ["127.0.0.2"])
        client = WebhookClient(allow_private=True, resolver=resolver, connector=noting)
        url = receiver.url.replace("127.0.0.1", "rebinding.test")
        assert post(client, url).status == 200
    assert (asked, peers) == (["rebinding.test"], ["127.0.0.1"])
    assert sink.requests == []


def test_f31_the_certificate_must_be_the_names_and_not_the_addresss(tmp_path: Path) -> None:
    server, trusting = make_certificates(tmp_path, "hook.test")
    resolver, _ = answering(["127.0.0.1"])
    with receiving(context=server) as receiver:
        for name, is_right in (("hook.test", True), ("rebound.test", False)):
            client = WebhookClient(allow_private=True, resolver=resolver, ssl_context=trusting)
            reply = post(client, receiver.url.replace("127.0.0.1", name))
            assert (reply.status == 200) is is_right, reply
        strict = WebhookClient(allow_private=True, resolver=resolver)
        distrusted = post(strict, receiver.url.replace("127.0.0.1", "hook.test"))
        assert "certificate" in (distrusted.error or "").lower()
        plain = ssl.create_default_context()
        assert (plain.check_hostname, plain.verify_mode) == (True, ssl.CERT_REQUIRED)
    assert len(receiver.requests) == 1


def test_f31_a_resolver_that_hangs_costs_three_seconds() -> None:
    async def hanging(_host: str, _port: int) -> list[str]:
        await asyncio.Event().wait()
        return []

    began = time.monotonic()
    reply = post(WebhookClient(allow_private=True, resolver=hanging), "http://slow.test/")
    assert 2.5 < time.monotonic() - began < 6
    assert "not resolved in time" in (reply.error or "")
