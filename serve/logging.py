"""The service's log: readable lines, or one JSON object a line."""

from __future__ import annotations

import copy
import json
import logging
from datetime import datetime, timezone
from typing import Any, Literal

from uvicorn.config import LOGGING_CONFIG

access = logging.getLogger("fdconv.access")


def log_access(**fields: Any) -> None:
    """Write one request's line: its fields, and as JSON the same."""
    if access.isEnabledFor(logging.INFO):
        text = " ".join(f"{name}={json.dumps(value)}" for name, value in fields.items())
        access.info("%s", text, extra={"fields": fields})


class JsonFormatter(logging.Formatter):
    """A record as one line of JSON; what was passed as ``extra={"fields": {...}}`` beside it."""

    def format(self, record: logging.LogRecord) -> str:
        """See ``logging.Formatter``."""
        found: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, timezone.utc).isoformat(
                timespec="milliseconds"
            ),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            found["exception"] = self.formatException(record.exc_info)
        return json.dumps(found, default=str)


def log_config(level: str, form: Literal["text", "json"]) -> dict[str, Any]:
    """Uvicorn's logging with the service's own beside it, for ``logging.config``."""
    config = copy.deepcopy(LOGGING_CONFIG)
    # The service writes its own access log, with request ids and timings.
    config["loggers"].pop("uvicorn.access", None)
    for name in ("fdconv.serve", "fdconv.access"):
        config["loggers"][name] = {
            "handlers": ["default"],
            "level": level.upper(),
        }
    if form == "json":
        config["formatters"] = {"default": {"()": JsonFormatter}}
        config["handlers"] = {
            "default": {
                "class": "logging.StreamHandler",
                "formatter": "default",
                "stream": "ext://sys.stderr",
            }
        }
        config["loggers"]["uvicorn"] = {"handlers": ["default"], "level": "INFO"}
    return config
