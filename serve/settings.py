"""What the operator of the service may set."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator, model_validator

from fdconv_deploy.runtime.images import MAX_PIXELS
from fdconv_deploy.runtime.multiband import FORMATS

# First parts of the service's own addresses.
OWN_PATHS = (
    "v1", "v2", "docs", "static", "samples", "metrics", "healthz", "readyz", "openapi.json",
    "favicon.ico",
)  # fmt: skip


class Settings(BaseModel):
    """Limits, sizes and policies of the service.

    Memory: images in hand number at most ``workers + queue_limit``, and each may hold its
    decoded pixels, 3 bytes for each of ``max_pixels``; all request bodies in hand together
    hold at most ``max_bytes_in_hand``. At the defaults that is 3.8 GB if all of them are as
    large as they may be.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    # How models run
    backend: str = Field(default="auto", description="Inference backend, as in open_session.")
    threads: int | None = Field(
        default=None,
        ge=1,
        description="CPU threads per run; as many as there are physical cores to use when unset.",
    )
    workers: int = Field(default=1, ge=1, description="Inference runs at a time.")
    isolation: Literal["thread", "process"] = Field(
        default="thread",
        description="Where inference runs: threads of the service, or a child process per "
        "worker, so that a crash in native code costs only the requests that worker had.",
    )
    run_timeout_seconds: float = Field(
        default=60.0,
        gt=0,
        description="With isolation 'process': a run that takes longer is stopped.",
    )
    codec_threads: int = Field(
        default=2, ge=1, description="Threads that decode and encode images."
    )

    # Scheduling
    max_batch: int | None = Field(
        default=None, ge=1, description="Largest batch to run; the bundle's largest when unset."
    )
    batch_delay_ms: float = Field(
        default=0.0,
        ge=0,
        description="How long the first of a batch that is not full waits for others while a "
        "worker is free. 0 batches only what waits anyway, right on a CPU; a GPU gains from 2-5.",
    )
    queue_limit: int = Field(
        default=16, ge=0, description="Images that may wait beside those running; more get a 503."
    )
    client_limit: int | None = Field(
        default=None,
        ge=1,
        description="Images one client (API key, else address) may have in hand; more get a 429.",
    )
    deadline_ms: int = Field(
        default=30_000,
        ge=1,
        description="A request not answered by then gets a 504; clients may ask for less.",
    )
    weights: dict[str, float] = Field(
        default_factory=dict,
        description="A model's share of inference time relative to the others, 1 when not given.",
    )
    retry_after_seconds: int = Field(
        default=1, ge=1, description="The least that a 429 or 503 tells the client to wait."
    )

    # The repository
    verify: bool = Field(default=True, description="Hash every bundle's files when opening it.")
    load: Literal["start", "demand"] = Field(
        default="start", description="Load models at the start, or each at its first request."
    )
    memory_budget_bytes: int | None = Field(
        default=None,
        ge=1,
        description="Models beyond it are unloaded, the least recently used first.",
    )
    reload_seconds: float = Field(
        default=0.0, ge=0, description="How often to look for changed bundles; 0 never."
    )
    model_control: bool = Field(
        default=False, description="Let clients load and unload models (KServe's extension)."
    )

    # What a request may bring
    max_body_bytes: int = Field(
        default=64 << 20, ge=1, description="Largest body, in bytes, as sent and decompressed."
    )
    max_bytes_in_hand: int = Field(
        default=512 << 20, ge=1, description="All bodies in hand together; more get a 503."
    )
    max_pixels: int = Field(
        default=MAX_PIXELS, ge=1, description="Largest image, in pixels, checked before decoding."
    )
    max_images: int = Field(default=16, ge=1, description="Images in one request.")
    max_answer_bytes: int = Field(
        default=256 << 20, ge=1, description="Largest answer of logits, in bytes."
    )
    formats: tuple[str, ...] = Field(default=FORMATS, description="Image formats accepted.")
    header_seconds: float = Field(
        default=10.0, gt=0, description="A client must have sent a request's headers by then."
    )
    body_seconds: float = Field(
        default=60.0, gt=0, description="A client must have sent a request's body by then."
    )
    write_seconds: float = Field(
        default=30.0, gt=0, description="A client that reads nothing for so long is cut off."
    )
    max_connections: int = Field(default=1024, ge=1, description="Open connections; then 503.")

    # Who may ask
    api_keys: tuple[SecretStr, ...] = Field(
        default=(), description="When given, every address but health and the page needs one."
    )
    tls_certificate: Path | None = Field(default=None, description="PEM file; serves HTTPS.")
    tls_key: Path | None = Field(default=None, description="PEM file of the certificate's key.")
    tls_client_ca: Path | None = Field(
        default=None, description="PEM file; clients must show a certificate it has signed."
    )

    # Operation
    root_path: str = Field(
        default="",
        description="Path prefix under which a proxy serves this service, such as /segmentation; "
        "the proxy may take it off or leave it.",
    )
    grpc_port: int | None = Field(
        default=None, ge=0, le=65535, description="Port of the KServe gRPC service; none unset."
    )
    log_format: Literal["text", "json"] = Field(default="text")
    tracing: bool = Field(
        default=False,
        description="Make OpenTelemetry spans; its environment (OTEL_...) says where they go.",
    )
    shutdown_delay_seconds: float = Field(
        default=0.0,
        ge=0,
        description="How long a stopping server is unready but still accepts, so that load "
        "balancers can look away first.",
    )
    drain_seconds: int = Field(
        default=30, ge=0, description="How long a stopping server lets requests under way finish."
    )

    @field_validator("root_path")
    @classmethod
    def _prefix(cls, given: str) -> str:
        path = given.rstrip("/")
        if not re.fullmatch(r"(/[A-Za-z0-9._~-]+)*", path):
            raise ValueError(
                "it should be a path such as /segmentation, of letters, digits and . _ ~ -"
            )
        # Else /v1/models could be that address, or the address /models under the prefix /v1.
        if path.partition("/")[2].partition("/")[0] in OWN_PATHS:
            raise ValueError(f"the service's own addresses begin with {', '.join(OWN_PATHS)}")
        return path

    @model_validator(mode="after")
    def _consistent(self) -> Settings:
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("tls_certificate and tls_key are given together or not at all")
        if self.tls_client_ca is not None and self.tls_certificate is None:
            raise ValueError("tls_client_ca needs tls_certificate and tls_key")
        unknown = set(self.formats) - set(FORMATS)
        if unknown or not self.formats:
            raise ValueError(f"formats are some of {', '.join(FORMATS)}")
        if any(weight <= 0 for weight in self.weights.values()):
            raise ValueError("weights are above 0")
        return self
