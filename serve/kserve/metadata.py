"""Triton's two extensions that tell how a model is served, and what it has done so far."""

from __future__ import annotations

from typing import Any

from fdconv_deploy.serve.kserve.inference import model_metadata
from fdconv_deploy.serve.schemas import ModelCard
from fdconv_deploy.serve.service import Service
from fdconv_deploy.serve.settings import Settings


def model_config(card: ModelCard, settings: Settings) -> dict[str, Any]:
    """A model's configuration, in the form of Triton's ModelConfig; shapes without the batch."""
    described = model_metadata(None, card)
    return {
        "name": card.name,
        "platform": described["platform"],
        "version_policy": {"latest": {"num_versions": 1}},
        # What a request may bring; larger ones than the graphs' are run in parts.
        "max_batch_size": settings.max_images,
        "input": [_tensor(entry) for entry in described["inputs"]],
        "output": [_tensor(entry) for entry in described["outputs"]],
        "dynamic_batching": {
            "preferred_batch_size": list(card.batch_sizes),
            "max_queue_delay_microseconds": round(settings.batch_delay_ms * 1e3),
        },
    }


def _tensor(entry: dict[str, Any]) -> dict[str, Any]:
    found = {"name": entry["name"], "data_type": f"TYPE_{entry['datatype']}"}
    if dims := entry["shape"][1:]:
        return {**found, "dims": dims}
    # One number an image: dims may not be empty.
    return {**found, "dims": [1], "reshape": {"shape": []}}


def model_statistics(service: Service, name: str = "", version: str = "") -> dict[str, Any]:
    """What a model has done since it was loaded; every model where none is named.

    Models that are not loaded have nothing to tell, and are left out.

    :raises RefusedError: 404, there is no such model or version.
    """
    repository = service.repository
    models = [repository.get_version(name, version)] if name else list(repository)
    return {
        "model_stats": [
            service.statistics[model.name].as_dict(model.name, model.version.card.version)
            for model in models
            if model.version is not None
        ]
    }
