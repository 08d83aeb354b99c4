"""Who asks: the one identity of a client, over HTTP and gRPC, for limits, logs and metrics."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from fdconv_deploy.serve.errors import RefusedError
from fdconv_deploy.serve.settings import Settings

FORWARDED = "x-forwarded-for"
_PROXIES = 32  # in a row; there is no end to what a client may have put before them
Address = ipaddress.IPv4Address | ipaddress.IPv6Address


class Client(NamedTuple):
    """A client: its address, and the short name of its API key, empty without a valid one."""

    address: str
    key: str

    @property
    def name(self) -> str:
        """What its share is counted by: the key, which may come from many addresses, if any."""
        return self.key or self.address


class Clients:
    """Identifies clients. Of keys, only hashes are compared and kept."""

    def __init__(self, settings: Settings) -> None:
        self._digests = [_digest(key.get_secret_value()) for key in settings.api_keys]
        self._proxies = settings.trusted_proxies

    @property
    def keys_needed(self) -> bool:
        """Whether there are any API keys."""
        return bool(self._digests)

    def identify(self, peer: str, headers: Sequence[tuple[str, str]]) -> Client:
        """Identify the sender of a request by its peer's address and its headers, or metadata.

        Their names are in lower case; the address may be any text of a server that has none.
        """
        address = _normalized(peer)
        if self._proxies:
            address = self._forwarded(address, headers)
        return Client(address, self._key(headers) if self._digests else "")

    def check(self, client: Client) -> None:
        """Refuse a client without a key by a 401, where there are keys."""
        if self._digests and not client.key:
            raise RefusedError(
                401,
                "This service asks for an API key. Send it as 'Authorization: Bearer KEY' or "
                "'X-API-Key: KEY'.",
                {"WWW-Authenticate": "Bearer"},
            )

    def _forwarded(self, address: str, headers: Sequence[tuple[str, str]]) -> str:
        """The last address that a trusted proxy vouches for.

        Each proxy appends whom it was asked by; what stands before the last address that is no
        trusted proxy's may be invented.
        """
        given = ",".join(value for name, value in headers if name == FORWARDED)
        chain = given.rsplit(",", _PROXIES)[-_PROXIES:]
        while chain and self._trusts(address):
            before = _without_port(chain.pop().strip())
            if _parsed(before) is None:
                break
            address = _normalized(before)
        return address

    def _trusts(self, address: str) -> bool:
        found = _parsed(address)
        return found is not None and any(found in network for network in self._proxies)

    def _key(self, headers: Sequence[tuple[str, str]]) -> str:
        given = dict(reversed(headers))  # of several, the first counts
        scheme, _, token = given.get("authorization", "").partition(" ")
        key = token.strip() if scheme.lower() == "bearer" else given.get("x-api-key", "")
        found = _digest(key)
        # Every key is compared, each in constant time.
        known = sum(hmac.compare_digest(found, digest) for digest in self._digests)
        return f"key-{found[:12]}" if key and known else ""


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def _parsed(text: str) -> Address | None:
    """An address; IPv4 where a socket of IPv6 gave it in IPv6's form. None of other text."""
    return _parsed_once(text) if len(text) < 80 else None


@lru_cache(maxsize=4096)
def _parsed_once(text: str) -> Address | None:
    try:
        found = ipaddress.ip_address(text)
    except ValueError:
        return None
    return getattr(found, "ipv4_mapped", None) or found


@lru_cache(maxsize=4096)
def _normalized(text: str) -> str:
    """An address in its one spelling; other text as it is."""
    return str(_parsed(text) or text)


def _without_port(text: str) -> str:
    """The address of ``1.2.3.4:80`` and ``[::1]:80``, as some proxies write them."""
    if text.startswith("["):
        return text[1:].partition("]")[0]
    return text.partition(":")[0] if text.count(":") == 1 else text
