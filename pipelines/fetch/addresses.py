"""Keeps connections away from addresses that are not public.

A URL of a list, or a redirect, could otherwise make a worker read from services of its own network,
such as a cloud's metadata service. The address is checked when the socket is made, after names have
been resolved, so that a name whose address changes between a check and its use gains nothing.
"""

from __future__ import annotations

import ipaddress
import socket
from typing import Any

NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
"""Addresses whose last 32 bits are an IPv4 address that a gateway connects to (RFC 6052)."""
COMPATIBLE = ipaddress.IPv6Network("::/96")
"""Addresses whose last 32 bits are an IPv4 address, by a rule that is no longer in use."""
IPV4_BITS = 2**32 - 1

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


class BlockedAddressError(OSError):
    """An address is not public."""


def is_public(text: str) -> bool:
    """Return whether an IP address is one of the public Internet.

    An IPv6 address that contains an IPv4 address (mapped, 6to4, Teredo, NAT64) is public only if
    that is public as well.
    """
    address: Address = ipaddress.ip_address(text.partition("%")[0])
    return all(_is_public(one) for one in (address, *_inside(address)))


def _is_public(address: Address) -> bool:
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None or address in NAT64:
            return True  # the address inside counts
        if address.is_site_local:
            return False
    return address.is_global and not (
        address.is_multicast or address.is_reserved or address.is_unspecified
    )


def _inside(address: Address) -> list[Address]:
    """Return the IPv4 addresses that an IPv6 address contains."""
    if isinstance(address, ipaddress.IPv4Address):
        return []
    found: list[Address | None] = [address.ipv4_mapped, address.sixtofour]
    found += address.teredo or ()
    if address in NAT64 or address in COMPATIBLE:
        found.append(ipaddress.IPv4Address(int(address) & IPV4_BITS))
    return [one for one in found if one is not None]


def public_socket(address_info: tuple[Any, ...]) -> socket.socket:
    """Make the socket of a connection to a public address.

    Args:
        address_info: Family, type, protocol, name and address, as `socket.getaddrinfo` gives them.

    Raises:
        BlockedAddressError: The address is not public.
    """
    family, kind, protocol, _, address = address_info
    if family not in (socket.AF_INET, socket.AF_INET6) or not is_public(str(address[0])):
        # The same text for all addresses of a name: then the connector raises it as it is.
        raise BlockedAddressError("not a public address")
    return socket.socket(family=family, type=kind, proto=protocol)
