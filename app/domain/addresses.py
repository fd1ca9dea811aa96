"""Which network addresses the server may be made to call: the rule against request forgery."""

import ipaddress
import re
from ipaddress import IPv4Address, IPv6Address

#: Of IPv6, only what is handed out to the internet: not NAT64, IPv4-compatible or -translated, site-local ...
_UNICAST = ipaddress.ip_network("2000::/3")
# Ranges that `is_global` takes for public though they carry an IPv4 address inside, or are nobody's on the
# internet: protocol assignments, relays of 6to4, the host agent of a cloud, 6to4, Teredo, documentation.
_DENIED = tuple(
    ipaddress.ip_network(text)
    for text in (
        *("192.0.0.0/24", "192.88.99.0/24", "168.63.129.16/32"),
        *("2002::/16", "2001::/23", "3fff::/20"),
    )
)
# As browsers do: a host whose last label is a number is an IPv4 address, in whatever notation.
_NUMERIC = re.compile(r"(?:^|\.)(?:\d+|0[xX][0-9a-fA-F]*)\.?$", re.ASCII)


def is_public_address(text: str) -> bool:
    """Whether an IP address belongs to the public internet; anything unclear does not.

    `ipaddress`'s `is_global` alone says yes to NAT64, 6to4 and IPv4-compatible forms of private addresses,
    to multicast and to site-local ones.
    """
    try:
        address = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return False
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    if isinstance(address, IPv6Address) and address not in _UNICAST:
        return False
    if any(address in network for network in _DENIED if network.version == address.version):
        return False
    return address.is_global and not _is_special(address)


def is_public_host(host: str) -> bool:
    """Whether a URL's host is a name, to be judged when it is resolved, or else a public address as it is usually written.

    `2130706433`, `0x7f000001`, `0177.0.0.1` and `127.1` are loopback in disguise: resolvers take them.
    """
    if ":" in host or "%" in host:
        return is_public_address(host)
    if _NUMERIC.search(host):
        return is_public_address(host)
    return host.rstrip(".").lower() != "localhost" and not host.lower().rstrip(".").endswith(
        ".localhost"
    )


def _is_special(address: IPv4Address | IPv6Address) -> bool:
    return (
        address.is_multicast
        or address.is_reserved
        or address.is_link_local
        or address.is_unspecified
        or address.is_loopback
        or (isinstance(address, IPv6Address) and address.is_site_local)
    )
