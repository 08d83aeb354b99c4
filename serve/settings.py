"""What the operator of the service may set."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from fdconv_deploy.runtime.decoding import MAX_PIXELS


class Settings(BaseModel):
    """Limits and sizes of the service.

    Requests in hand number at most ``workers + queue_limit``, and each may hold its body and
    its decoded image: ``max_body_bytes`` and 3 bytes for each of ``max_pixels``. At the
    defaults that is 3.8 GB if all of them are as large as they may be.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    backend: str = Field(default="auto", description="Inference backend, as in open_session.")
    threads: int | None = Field(
        default=None, ge=1, description="CPU threads per run; all when unset."
    )
    verify: bool = Field(default=True, description="Hash every bundle's files when opening it.")
    workers: int = Field(default=1, ge=1, description="Inference runs at a time.")
    queue_limit: int = Field(
        default=16, ge=0, description="Requests that may wait beside those running; more get a 503."
    )
    retry_after_seconds: int = Field(
        default=1, ge=1, description="What a 503 tells the client to wait, in seconds."
    )
    codec_threads: int = Field(
        default=2, ge=1, description="Threads that decode and encode images."
    )
    max_body_bytes: int = Field(
        default=32 << 20, ge=1, description="Largest request body, in bytes."
    )
    max_pixels: int = Field(
        default=MAX_PIXELS, ge=1, description="Largest image, in pixels, checked before decoding."
    )
    drain_seconds: int = Field(
        default=30, ge=0, description="How long a stopping server lets requests under way finish."
    )
