"""The protocol's repository extension: which models there are, and who may change that."""

from __future__ import annotations

from fdconv_deploy.serve.errors import RefusedError
from fdconv_deploy.serve.model_repository import Repository
from fdconv_deploy.serve.service import Service

_STATES = {
    "ready": "READY",
    "loading": "LOADING",
    "unloaded": "UNAVAILABLE",
    "failed": "UNAVAILABLE",
}


def index_of(repository: Repository, *, ready: bool) -> list[dict[str, str]]:
    """Every model's name, version and state; with ``ready``, of those that are."""
    found = []
    for model in repository:
        card = repository.card(model)
        if ready and card.state != "ready":
            continue
        reason = "" if card.state in ("ready", "loading") else card.state
        found.append(
            {
                "name": card.name,
                "version": card.version,
                "state": _STATES[card.state],
                "reason": reason,
            }
        )
    return found


def require_control(service: Service) -> None:
    """Refuse loading and unloading by clients where the operator has not allowed it.

    :raises RefusedError: 403.
    """
    if not service.settings.model_control:
        raise RefusedError(
            403,
            "Clients may not load or unload models here. Start the service with "
            "--model-control to allow it.",
        )
