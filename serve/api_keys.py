"""API keys."""

from __future__ import annotations

import hashlib
import hmac

from fdconv_deploy.serve.errors import RefusedError
from fdconv_deploy.serve.settings import Settings


class Keys:
    """The keys that may ask. Only hashes are compared and kept."""

    def __init__(self, settings: Settings) -> None:
        self._digests = [_digest(key.get_secret_value()) for key in settings.api_keys]

    @property
    def needed(self) -> bool:
        """Whether there are any."""
        return bool(self._digests)

    def check(self, authorization: str, api_key: str) -> str:
        """Who asks: a short name for the key, empty where none is needed.

        Args:
            authorization: The header ``Authorization: Bearer KEY``.
            api_key: The header ``X-API-Key: KEY``.

        Raises:
            RefusedError: 401, it is none of the keys.
        """
        if not self._digests:
            return ""
        scheme, _, token = authorization.partition(" ")
        given = token.strip() if scheme.lower() == "bearer" else api_key
        found = _digest(given)
        # Every key is compared, each in constant time.
        if not given or not sum(hmac.compare_digest(found, digest) for digest in self._digests):
            raise RefusedError(
                401,
                "This service asks for an API key. Send it as 'Authorization: Bearer KEY' or "
                "'X-API-Key: KEY'.",
                {"WWW-Authenticate": "Bearer"},
            )
        return f"key-{found[:12]}"


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()
