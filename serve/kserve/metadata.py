"""What the KServe protocol tells of the server and its models: metadata, configuration, states."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from fdconv_deploy.errors import FDConvError
from fdconv_deploy.serve.errors import RefusedError
from fdconv_deploy.serve.kserve.statistics import ModelStatisticsList
from fdconv_deploy.serve.model_cards import ModelCard, TensorMetadata
from fdconv_deploy.serve.model_repository import Repository
from fdconv_deploy.serve.service import Service
from fdconv_deploy.serve.settings import Settings
from fdconv_deploy.version import __version__

PLATFORM = "onnxruntime_onnx"
IndexState = Literal["READY", "LOADING", "UNAVAILABLE"]
_STATES: dict[str, IndexState] = {
    "ready": "READY",
    "loading": "LOADING",
    "unloaded": "UNAVAILABLE",
    "failed": "UNAVAILABLE",
}


class ServerLive(BaseModel):
    """KServe v2: whether the process lives."""

    live: bool = True


class ServerReady(BaseModel):
    """KServe v2: whether the server, or a model, is ready."""

    ready: bool


class ServerMetadata(BaseModel):
    """KServe v2: what this server is."""

    name: str = "fdconv-deploy"
    version: str = __version__
    extensions: list[str] = [
        "binary_tensor_data",
        "model_configuration",
        "model_repository",
        "statistics",
    ]


class ModelMetadata(BaseModel):
    """KServe v2: a model's inputs and outputs."""

    name: str
    versions: list[str]
    platform: str = PLATFORM
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]


class ConfigTensor(BaseModel):
    """Triton: one input or output of a model, without the batch."""

    name: str
    data_type: str = Field(description="TYPE_ and the protocol's name of the datatype.")
    dims: list[int]
    reshape: dict[str, list[int]] | None = Field(
        default=None, description="The shape itself, where `dims` cannot express it."
    )
    optional: bool | None = Field(default=None, description="An input that may be left out.")


class DynamicBatching(BaseModel):
    """Triton: how requests are batched."""

    preferred_batch_size: list[int] = Field(description="Batch sizes the bundle has graphs for.")
    max_queue_delay_microseconds: int


class ModelConfig(BaseModel):
    """Triton: how a model is served, as far as its ModelConfig applies here."""

    name: str
    platform: str = PLATFORM
    version_policy: dict[str, dict[str, int]] = {"latest": {"num_versions": 1}}
    max_batch_size: int = Field(description="Most images in one request.")
    input: list[ConfigTensor]
    output: list[ConfigTensor]
    dynamic_batching: DynamicBatching


class IndexCall(BaseModel):
    """KServe v2: which models are to be listed."""

    model_config = ConfigDict(strict=True)

    ready: bool = False


class ControlCall(BaseModel):
    """Triton: what a client sends to load or unload a model."""

    model_config = ConfigDict(strict=True)

    parameters: dict[str, Any] = {}


class ModelIndexEntry(BaseModel):
    """KServe v2: a model and its state."""

    name: str
    version: str | None = Field(default=None, description="The one that is loaded, if any.")
    state: IndexState
    reason: str | None = Field(
        default=None, description="Why it is unavailable: 'unloaded' or 'failed'."
    )


def model_metadata(card: ModelCard) -> ModelMetadata:
    """A model's inputs and outputs; -1 is the batch, of any size."""
    versions = [card.version] if card.state == "ready" else []
    inputs, outputs = card.tensors
    return ModelMetadata(name=card.name, versions=versions, inputs=inputs, outputs=outputs)


def model_config(card: ModelCard, settings: Settings) -> ModelConfig:
    """A model's configuration, as Triton's ModelConfig; shapes without the batch."""

    def described(tensor: TensorMetadata) -> ConfigTensor:
        dims, datatype = tensor.shape[1:], f"TYPE_{tensor.datatype}"
        if dims:
            return ConfigTensor(name=tensor.name, data_type=datatype, dims=dims)
        # One number per image: dims may not be empty.
        return ConfigTensor(name=tensor.name, data_type=datatype, dims=[1], reshape={"shape": []})

    metadata = model_metadata(card)
    return ModelConfig(
        name=card.name,
        # Requests of more images than the graphs' batch are run in parts.
        max_batch_size=settings.max_images,
        input=[
            # A detector's `sizes` is the whole input when it is not given.
            described(tensor).model_copy(update={"optional": tensor.name != "images" or None})
            for tensor in metadata.inputs
        ],
        output=[described(tensor) for tensor in metadata.outputs],
        dynamic_batching=DynamicBatching(
            preferred_batch_size=card.batch_sizes,
            max_queue_delay_microseconds=round(settings.batch_delay_ms * 1e3),
        ),
    )


def model_statistics(service: Service, name: str = "", version: str = "") -> ModelStatisticsList:
    """What a model has done since it was loaded; every model where none is named.

    Models that are not loaded are left out.

    Raises:
        RefusedError: 404, there is no such model or version.
    """
    repository = service.repository
    models = [repository.get_version(name, version)] if name else list(repository)
    loaded = [model.name for model in models if model.version is not None]
    service.metrics.settle()
    return ModelStatisticsList(model_stats=[service.statistics[name] for name in loaded])


def repository_index(repository: Repository, *, ready: bool = False) -> list[ModelIndexEntry]:
    """Every model's name, version and state; with ``ready``, only models that are ready."""
    cards = [repository.card(model) for model in repository]
    return [
        ModelIndexEntry(
            name=card.name,
            version=card.version if card.state == "ready" else None,
            state=_STATES[card.state],
            reason=card.state if card.state in ("unloaded", "failed") else None,
        )
        for card in cards
        if card.state == "ready" or not ready
    ]


async def load_model(service: Service, name: str, parameters: Mapping[str, Any]) -> None:
    """Load a model, or again where its bundle has changed, if the operator lets clients do that.

    Args:
        service: That has the model.
        name: The model's.
        parameters: The client's. Triton's "config" and "file:..." ask for another model than the
            bundle holds.

    Raises:
        RefusedError: 403, they may not; 404, there is no such model; 400, it does not load, or is
            to be loaded in another way.
    """
    _check_control(service.settings)
    for key in parameters:
        if key == "config" or key.startswith("file:"):
            raise RefusedError(
                400,
                f"A model is loaded as its bundle says, without the parameter {key[:60]!r}. Put "
                "another bundle in its place.",
            )
    try:
        await service.repository.load(service.repository.get(name))
    except FDConvError as error:
        raise RefusedError(
            400, f"The model {name!r} does not load; the server's log says why."
        ) from error


async def unload_model(service: Service, name: str) -> None:
    """Unload a model, where the operator lets clients do that.

    Raises:
        RefusedError: 403, they may not; 404, there is no such model.
    """
    _check_control(service.settings)
    await service.repository.unload(service.repository.get(name))


def _check_control(settings: Settings) -> None:
    if not settings.model_control:
        raise RefusedError(
            403,
            "Clients may not load or unload models here. Start the service with "
            "--model-control to allow it.",
        )
