"""What the application on Ray may be told."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, get_origin

from pydantic import (
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    ValidationInfo,
    field_validator,
    model_validator,
)

from fdconv_deploy.serve.settings import Settings

# What another setting, or Ray, is there for.
_NOT_HERE = {
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


class Arguments(Settings):
    """What :func:`app` takes: the service's settings, and how it is spread over a cluster."""

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
    def _possible(self) -> Arguments:
        for name in sorted(self.model_fields_set & set(_NOT_HERE)):
            raise ValueError(f"{name} is no setting of the service on Ray: {_NOT_HERE[name]}")
        if self.max_replicas is not None and self.max_replicas < self.replicas:
            raise ValueError("max_replicas is less than replicas")
        return self
