"""The address rule, over every trap that the standard library's flags fall into."""

import pytest

from app.domain.addresses import is_public_address


@pytest.mark.parametrize(
    "text",
    [
        *("127.0.0.1", "127.8.8.8", "10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254"),
        *("100.64.0.1", "100.127.255.255", "0.0.0.0", "255.255.255.255", "224.0.0.1", "239.1.1.1"),
        *("240.0.0.1", "192.0.0.192", "192.0.2.1", "198.18.0.1", "198.51.100.1", "203.0.113.1"),
        *("::1", "::", "fe80::1", "fe80::1%eth0", "fc00::1", "fd00::1", "ff02::1", "fec0::1"),
        *("64:ff9b::a9fe:a9fe", "64:ff9b::808:808", "64:ff9b:1::1", "2002:a9fe:a9fe::1"),
        *("2002:808:808::1", "::169.254.169.254", "::8.8.8.8", "::ffff:127.0.0.1"),
        *(
            "::ffff:169.254.169.254",
            "2001::1",
            "2001:0:4136:e378:8000:63bf:3fff:fdd2",
            "2001:db8::1",
        ),
        *("", "localhost", "2130706433", "0x7f000001", "127.1", "0177.0.0.1", "example.org"),
    ],
)
def test_private_reserved_and_disguised_addresses_are_not_public(text: str) -> None:
    assert not is_public_address(text)


@pytest.mark.parametrize(
    "text", ["8.8.8.8", "93.184.216.34", "2606:2800:220:1::1", "2a00:1450::1", "::ffff:8.8.8.8"]
)
def test_addresses_of_the_internet_are_public(text: str) -> None:
    assert is_public_address(text)
