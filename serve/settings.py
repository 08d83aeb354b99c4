"""What the operator of the service may set, on one machine and on a Ray cluster."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal, get_origin

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    IPvAnyNetwork,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    SecretStr,
    ValidationInfo,
    field_validator,
    model_validator,
)

from fdconv_deploy.errors import FDConvError
from fdconv_deploy.runtime.images import FORMATS, MAX_PIXELS

# First parts of the service's own addresses.
OWN_PATHS = (
    "v1", "v2", "docs", "static", "samples", "metrics", "healthz", "readyz", "openapi.json",
    "favicon.ico",
)  # fmt: skip


class Settings(BaseModel):
    """Limits, sizes and policies of the service.

    Memory: beside the models, ``max_bytes_in_hand`` for request bodies and ``max_memory_in_hand``
    for the images, tensors and answers of the requests being worked on.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    # How models run
    backend: str = "auto"
    """Inference backend, as in open_session."""
    threads: PositiveInt | None = None
    """CPU threads per run; as many as there are physical cores to use when unset."""
    workers: PositiveInt = 1
    """Inference runs at a time."""
    isolation: Literal["thread", "process"] = "thread"
    """Where inference runs: threads of the service, or a child process per worker, so that a crash
    in native code costs only the requests that worker had."""
    run_timeout_seconds: PositiveFloat = 60.0
    """With isolation 'process': a run that takes longer is stopped."""
    codec_threads: PositiveInt = 2
    """Threads that decode and encode images."""

    # Scheduling
    max_batch: PositiveInt | None = None
    """Largest batch to run; the bundle's largest when unset."""
    batch_delay_ms: NonNegativeFloat = 0.0
    """How long the first of a batch that is not full waits for others while a worker is free. 0
    batches only what waits anyway, right on a CPU; a GPU gains from 2-5."""
    queue_limit: NonNegativeInt | None = None
    """Images that may wait beside those running; more get a 503. Unset, as many as can be answered
    by their deadlines, and as there is memory for their bodies."""
    client_limit: PositiveInt | None = None
    """Images one client (API key, else address) may have in hand; more get a 429."""
    deadline_ms: PositiveInt = 30_000
    """A request not answered by then gets a 504; clients may ask for less."""
    weights: dict[str, PositiveFloat] = {}
    """A model's share of inference time relative to the others, 1 when not given."""
    retry_after_seconds: PositiveInt = 1
    """The least that a 429 or 503 tells the client to wait."""

    # The repository
    verify: bool = True
    """Hash every bundle's files when opening it."""
    load: Literal["start", "demand"] = "start"
    """Load models at the start, or each at its first request."""
    memory_budget_bytes: PositiveInt | None = None
    """Models beyond it are unloaded, the least recently used first."""
    reload_seconds: NonNegativeFloat = 0.0
    """How often to look for changed bundles; 0 never."""
    model_control: bool = False
    """Let clients load and unload models (KServe's extension)."""

    # What a request may bring
    max_body_bytes: PositiveInt = 64 << 20
    """Largest body, in bytes, as sent and decompressed."""
    max_bytes_in_hand: PositiveInt = 256 << 20
    """All bodies in hand together; more get a 503."""
    max_memory_in_hand: PositiveInt = 768 << 20
    """Memory for the images, tensors and answers being worked on; other requests wait."""
    max_pixels: PositiveInt = MAX_PIXELS
    """Largest image, in pixels, checked before decoding."""
    max_images: PositiveInt = 16
    """Images in one request."""
    max_answer_bytes: PositiveInt = 256 << 20
    """Largest answer of logits, in bytes."""
    formats: tuple[str, ...] = FORMATS
    """Image formats accepted."""
    header_seconds: PositiveFloat = 10.0
    """A client must have sent a request's headers by then."""
    body_seconds: PositiveFloat = 60.0
    """A client must have sent a request's body by then."""
    write_seconds: PositiveFloat = 30.0
    """A client that reads nothing for so long is cut off."""
    max_connections: PositiveInt = 1024
    """Open connections; then 503."""

    # Who may ask
    api_keys: tuple[Annotated[SecretStr, Field(min_length=1)], ...] = ()
    """When given, every address but health and the page needs one."""
    tls_certificate: Path | None = None
    """PEM file; serves HTTPS."""
    tls_key: Path | None = None
    """PEM file of the certificate's key."""
    tls_client_ca: Path | None = None
    """PEM file; clients must show a certificate it has signed."""

    trusted_proxies: tuple[IPvAnyNetwork, ...] = ()
    """Addresses and networks, such as 10.0.0.0/8, of proxies whose X-Forwarded-For says who asks,
    for limits and logs; from others it is ignored."""
    cors_origins: tuple[str, ...] = ()
    """Origins, such as https://maps.example, whose pages may call the service from a browser; "*"
    for all."""

    # Operation
    root_path: str = ""
    """Path prefix under which a proxy serves this service, such as /segmentation; the proxy may
    take it off or leave it."""
    grpc_port: int | None = Field(default=None, ge=0, le=65535)
    """Port of the KServe gRPC service; none unset."""
    log_format: Literal["text", "json"] = "text"
    tracing: bool = False
    """Make OpenTelemetry spans; its environment (OTEL_...) says where they go."""
    shutdown_delay_seconds: NonNegativeFloat = 0.0
    """How long a stopping server is unready but still accepts, so that load balancers can look
    away first."""
    drain_seconds: NonNegativeInt = 30
    """How long a stopping server lets requests under way finish."""

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

    @field_validator("cors_origins")
    @classmethod
    def _origins(cls, given: tuple[str, ...]) -> tuple[str, ...]:
        for origin in given:
            if origin != "*" and not re.fullmatch(r"https?://[^/\s,]+", origin):
                raise ValueError(
                    f"{origin!r} is no origin: it should be '*', or scheme and host, and the port "
                    "if it has one, such as https://maps.example:8443"
                )
        return given

    @model_validator(mode="after")
    def _consistent(self) -> Settings:
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("tls_certificate and tls_key are given together or not at all")
        if self.tls_client_ca is not None and self.tls_certificate is None:
            raise ValueError("tls_client_ca needs tls_certificate and tls_key")
        unknown = set(self.formats) - set(FORMATS)
        if unknown or not self.formats:
            raise ValueError(f"formats are some of {', '.join(FORMATS)}")
        return self


# What another setting, or Ray, is there for.
_NOT_ON_RAY = {
    "grpc_port": "Ray's gRPC proxy takes other services than KServe's",
    "header_seconds": "Ray's proxy reads the requests",
    "isolation": "every replica is a process of its own",
    "log_format": "Ray's logging_config says it",
    "shutdown_delay_seconds": "Ray's proxy drains by itself",
    "tls_certificate": "Ray's http_options have TLS's files",
    "tls_client_ca": "Ray's http_options have TLS's files",
    "tls_key": "Ray's http_options have TLS's files",
    "weights": "replicas run their requests in the order of arrival",
    "workers": "replicas says it",
    "write_seconds": "Ray's proxy writes the answers",
}


class RaySettings(Settings):
    """The service's settings on Ray, and how it is spread over a cluster."""

    bundles: Annotated[tuple[Path, ...], Field(min_length=1)]
    """Bundle folders, or folders of them, at the same path on every node. The first is the default
    model."""
    api_keys_file: Path | None = None
    """File with one API key per line, at the same path on every node: Ray logs and shows
    ``api_keys`` as they were given."""
    replicas: PositiveInt = 1
    """Replicas of the model; the least of them with max_replicas."""
    max_replicas: PositiveInt | None = None
    """As many replicas as ongoing requests ask for, up to this."""
    target_ongoing_requests: PositiveFloat = 4.0
    """Images per replica, running and waiting, above which there are to be more of them."""
    max_ongoing_requests: PositiveInt = 8
    """Images that a replica takes at a time, running and waiting; no less than its largest
    batch."""
    models_per_replica: PositiveInt = 3
    """Models that a replica holds; of more, the least recently used makes room."""
    cpus: NonNegativeFloat = 1.0
    """CPUs of a replica, and where ``threads`` is unset the threads of its runs."""
    gpus: NonNegativeFloat = 0.0
    """GPUs of a replica."""
    ingress_replicas: PositiveInt = 1
    """Replicas of the ingress, which decodes images and encodes answers."""
    ingress_cpus: NonNegativeFloat = 1.0
    """CPUs of an ingress replica."""

    @field_validator("*", mode="before")
    @classmethod
    def _listed(cls, given: object, info: ValidationInfo) -> object:
        # As `serve run` gives it: a list's entries, separated by commas.
        kind = cls.model_fields[str(info.field_name)].annotation
        return given.split(",") if isinstance(given, str) and get_origin(kind) is tuple else given

    @model_validator(mode="after")
    def _possible(self) -> RaySettings:
        for name in sorted(self.model_fields_set & set(_NOT_ON_RAY)):
            raise ValueError(f"{name} is no setting of the service on Ray: {_NOT_ON_RAY[name]}")
        if self.max_replicas is not None and self.max_replicas < self.replicas:
            raise ValueError("max_replicas is less than replicas")
        return self


def read_keys(path: Path) -> list[str]:
    """The API keys of a file, one per line.

    Raises:
        FDConvError: It cannot be read, or holds none, which would leave the service open.
    """
    try:
        keys = path.read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no text"
        raise FDConvError(f"The API keys in {path} cannot be read: {reason}.") from error
    if not keys:
        raise FDConvError(
            f"{path} holds no API key, and without one anybody is answered. Write one a line into "
            "it, or name no file of keys."
        )
    return keys
