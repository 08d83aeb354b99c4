"""What the KServe protocol tells of the server and its models, with Triton's extensions."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic.dataclasses import dataclass

from fdconv_deploy.serve.model_cards import ModelCard, TensorMetadata
from fdconv_deploy.serve.settings import Settings
from fdconv_deploy.serve.telemetry import Stages
from fdconv_deploy.version import __version__

PLATFORM = "onnxruntime_onnx"
IndexState = Literal["READY", "LOADING", "UNAVAILABLE"]
_STATES: dict[str, IndexState] = {"ready": "READY", "loading": "LOADING"}  # else unavailable


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


@dataclass
class StatisticDuration:
    """Triton: how often something happened, and how long it took in all."""

    count: int = 0
    ns: int = Field(default=0, description="Nanoseconds.")

    def add(self, seconds: float) -> None:
        """Count one more."""
        self.count += 1
        self.ns += round(seconds * 1e9)


@dataclass
class InferStatistics:
    """Triton: requests and their stages."""

    success: StatisticDuration = Field(default_factory=StatisticDuration)
    fail: StatisticDuration = Field(default_factory=StatisticDuration)
    queue: StatisticDuration = Field(default_factory=StatisticDuration)
    compute_input: StatisticDuration = Field(default_factory=StatisticDuration)
    compute_infer: StatisticDuration = Field(default_factory=StatisticDuration)
    compute_output: StatisticDuration = Field(default_factory=StatisticDuration)
    cache_hit: StatisticDuration = Field(
        default_factory=StatisticDuration, description="Always 0: there is no response cache."
    )
    cache_miss: StatisticDuration = Field(default_factory=StatisticDuration)


@dataclass
class InferBatchStatistics:
    """Triton: the runs of one batch size.

    Images are prepared and masks made one by one, so a batch's time is that of its run alone.
    """

    batch_size: int
    compute_input: StatisticDuration = Field(default_factory=StatisticDuration)
    compute_infer: StatisticDuration = Field(default_factory=StatisticDuration)
    compute_output: StatisticDuration = Field(default_factory=StatisticDuration)


# Which of Triton's durations each stage of this service counts as.
_DURATION_OF = {
    "queue": "queue",
    "decode": "compute_input",
    "preprocess": "compute_input",
    "inference": "compute_infer",
    "postprocess": "compute_output",
    "encode": "compute_output",
}


@dataclass
class ModelStatistics:
    """Triton: what one model has done since it was loaded."""

    name: str
    version: str
    last_inference: int = Field(
        default=0, description="Milliseconds since 1970; 0 before the first."
    )
    inference_count: int = Field(default=0, description="Images answered.")
    execution_count: int = Field(default=0, description="Runs of the network.")
    inference_stats: InferStatistics = Field(default_factory=InferStatistics)
    batch_stats: list[InferBatchStatistics] = Field(default_factory=list)
    response_stats: dict[str, Any] = Field(
        default_factory=dict, description="Always empty: no model streams responses."
    )
    memory_usage: list[Any] = Field(
        default_factory=list, description="Always empty; a model's card says what it holds."
    )

    def succeeded(self, stages: Stages, images: int) -> None:
        """Count an answered request by the seconds of its stages."""
        seconds = dict.fromkeys(_DURATION_OF.values(), 0.0)
        for stage, taken in stages:
            seconds[_DURATION_OF[stage]] += taken
        for name, taken in seconds.items():
            getattr(self.inference_stats, name).add(taken)
        self.inference_stats.success.add(sum(seconds.values()))
        self.inference_count += images
        self.last_inference = round(time.time() * 1e3)

    def failed(self, seconds: float) -> None:
        """Count a request that was queued and not answered, ``seconds`` after it was."""
        self.inference_stats.fail.add(seconds)
        self.last_inference = round(time.time() * 1e3)

    def ran(self, images: int, seconds: float) -> None:
        """Count a run of the network with that many images."""
        self.execution_count += 1
        batch = next((b for b in self.batch_stats if b.batch_size == images), None)
        if batch is None:
            batch = InferBatchStatistics(batch_size=images)
            self.batch_stats = sorted([*self.batch_stats, batch], key=lambda b: b.batch_size)
        batch.compute_infer.add(seconds)


class ModelStatisticsList(BaseModel):
    """Triton: what models have done."""

    model_stats: list[ModelStatistics]


def model_metadata(card: ModelCard) -> ModelMetadata:
    """A model's inputs and outputs; -1 is the batch, of any size."""
    versions = [card.version] if card.state == "ready" else []
    inputs, outputs = card.tensors
    return ModelMetadata(name=card.name, versions=versions, inputs=inputs, outputs=outputs)


def model_config(card: ModelCard, settings: Settings) -> ModelConfig:
    """A model's configuration, as Triton's ModelConfig; shapes without the batch."""

    def described(tensor: TensorMetadata, optional: bool = False) -> ConfigTensor:
        dims = tensor.shape[1:]
        return ConfigTensor(
            name=tensor.name,
            data_type=f"TYPE_{tensor.datatype}",
            dims=dims or [1],  # one number per image: dims may not be empty
            reshape=None if dims else {"shape": []},
            optional=optional or None,
        )

    inputs, outputs = card.tensors
    return ModelConfig(
        name=card.name,
        # Requests of more images than the graphs' batch are run in parts.
        max_batch_size=settings.max_images,
        # A detector's `sizes` is the whole input when it is not given.
        input=[described(tensor, tensor.name != "images") for tensor in inputs],
        output=[described(tensor) for tensor in outputs],
        dynamic_batching=DynamicBatching(
            preferred_batch_size=card.batch_sizes,
            max_queue_delay_microseconds=round(settings.batch_delay_ms * 1e3),
        ),
    )


def repository_index(cards: Iterable[ModelCard], *, ready: bool = False) -> list[ModelIndexEntry]:
    """Every model's name, version and state; with ``ready``, only models that are ready."""
    return [
        ModelIndexEntry(
            name=card.name,
            version=card.version if card.state == "ready" else None,
            state=_STATES.get(card.state, "UNAVAILABLE"),
            reason=card.state if card.state in ("unloaded", "failed") else None,
        )
        for card in cards
        if card.state == "ready" or not ready
    ]
