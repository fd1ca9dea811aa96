"""Which network addresses the server may be made to call: the rule against request forgery."""

import ipaddress
from ipaddress import IPv4Address, IPv6Address

# Ranges that carry an IPv4 address inside, or that `is_global` takes for public though they are not.
_DENIED = tuple(
    ipaddress.ip_network(text)
    for text in (
        *("192.0.0.0/24", "64:ff9b::/96", "64:ff9b:1::/48", "2002::/16", "2001::/32", "::/96"),
        "fec0::/10",
    )
)


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
    if any(address in network for network in _DENIED if network.version == address.version):
        return False
    return address.is_global and not _is_special(address)


def _is_special(address: IPv4Address | IPv6Address) -> bool:
    return (
        address.is_multicast
        or address.is_reserved
        or address.is_link_local
        or address.is_unspecified
        or address.is_loopback
        or (isinstance(address, IPv6Address) and address.is_site_local)
    )
