"""The two things the service is measured against, on the same bundle and session.

``plain``: FastAPI as one writes it, with a thread pool in which a request is decoded, run and
encoded.
``litserve``: LitServe (``pip install litserve``), a general server for models.
Both take a float32 tensor at /tensor and give raw logits, and an image at /image and give a PNG
mask; as the raw body, and LitServe as the file of a form, its way to take binary data.
``python -m benchmarks.serving.baselines plain|litserve BUNDLE PORT WORKERS``.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
from fastapi import FastAPI, Request, Response

from fdconv_deploy.runtime import Session, open_session, read_image


def tensor_answer(session: Session, body: bytes) -> bytes:
    height, width = session.input_size
    return session.run(np.frombuffer(body, np.float32).reshape(-1, 3, height, width)).tobytes()


def image_answer(session: Session, body: bytes) -> bytes:
    return session.segment(read_image(body)).mask_png()


def plain(bundle: str, port: int, workers: int) -> None:
    import asyncio
    from concurrent.futures import ThreadPoolExecutor

    import uvicorn

    session = open_session(bundle, threads=1)
    session.warm_up()
    pool = ThreadPoolExecutor(workers)
    app = FastAPI()

    @app.get("/readyz")
    async def ready() -> dict[str, str]:
        return {}

    async def answer(call: Any, request: Request, media_type: str) -> Response:
        body = await request.body()
        loop = asyncio.get_running_loop()
        found = await loop.run_in_executor(pool, call, session, body)
        return Response(found, media_type=media_type)

    @app.post("/tensor")
    async def tensor(request: Request) -> Response:
        return await answer(tensor_answer, request, "application/octet-stream")

    @app.post("/image")
    async def image(request: Request) -> Response:
        return await answer(image_answer, request, "image/png")

    uvicorn.run(app, port=port, log_level="warning", access_log=False)


def litserve(bundle: str, port: int, workers: int) -> None:
    import litserve as ls

    from benchmarks.serving.litserve_api import Api

    apis = [Api(bundle, path) for path in ("/tensor", "/image")]
    server = ls.LitServer(
        apis, accelerator="cpu", workers_per_device=workers, healthcheck_path="/readyz"
    )
    server.run(port=port, generate_client_file=False, log_level="warning", num_api_servers=1)


if __name__ == "__main__":
    name, path, port, workers = sys.argv[1:]
    {"plain": plain, "litserve": litserve}[name](path, int(port), int(workers))
