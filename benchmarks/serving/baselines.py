"""The two things the service is measured against, on the same bundle and session.

``plain``: FastAPI as one writes it, with a thread pool in which a request is decoded, run and
encoded; on the service's own server, uvicorn with h11.
``litserve``: LitServe (``pip install litserve``), a general server for models.
Both take a float32 tensor at /tensor and give raw logits, and an image at /image and give a PNG
mask; as the raw body, and LitServe as the file of a form, its way to take binary data.
``python -m benchmarks.serving.baselines plain|litserve BUNDLE PORT WORKERS``.
"""

from __future__ import annotations

import asyncio
import socket
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import uvicorn
from fastapi import FastAPI, Request, Response

from fdconv_deploy.runtime import Session, open_session, read_image

SERVER: dict[str, Any] = {"http": "h11", "ws": "none", "log_level": "warning", "access_log": False}


def tensor_answer(session: Session, body: bytes) -> bytes:
    height, width = session.input_size
    return session.run(np.frombuffer(body, np.float32).reshape(-1, 3, height, width)).tobytes()


def image_answer(session: Session, body: bytes) -> bytes:
    return session.segment(read_image(body)).mask_png()


def plain_app(session: Session, workers: int) -> FastAPI:
    """FastAPI as one writes it."""
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

    return app


def plain(bundle: str, port: int, workers: int) -> None:
    session = open_session(bundle, threads=1)
    session.warm_up()
    uvicorn.run(plain_app(session, workers), port=port, **SERVER)


def bare(session: Session, listener: socket.socket) -> None:
    """The least that can be done: one thread that reads a request, runs it and answers.

    It takes what `benchmarks.serving.harness` sends and nothing else, and ends when ``listener``
    is closed.
    """
    height, width = session.input_size
    while True:
        try:
            plug, _ = listener.accept()
        except OSError:
            return
        plug.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with plug:
            while head := plug.recv(1 << 16):
                head, _, start = head.partition(b"\r\n\r\n")
                size = int(head.lower().partition(b"content-length: ")[2].split()[0])
                room, at = np.empty(size, np.uint8), len(start)
                room[:at] = np.frombuffer(start, np.uint8)
                while at < size:
                    at += plug.recv_into(room[at:])
                answer = session.run(room.view(np.float32).reshape(-1, 3, height, width))
                plug.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % answer.nbytes)
                plug.sendall(answer)


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
