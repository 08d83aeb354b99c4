"""The service on Ray: ``python -m benchmarks.serving.ray [--full]``.

On a cluster of this machine alone, deployed by serve/ray/serve.yaml: two replicas' answers against
the session's, bit for bit; requests while every hundredth kills a replica; what a client sees when
the ingress or Ray's proxy is killed; scaling from one replica to two and back; throughput beside
``fdconv serve`` with as many workers, in turns. Every run takes one thread.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import yaml

from benchmarks.serving.harness import (
    ROOT,
    Connection,
    Load,
    closed_loop,
    demo_bundle,
    finish,
    free_port,
    image_request,
    kserve_request,
    machine,
    median,
    ours,
    server,
)
from fdconv_deploy.runtime import open_session

# Before Ray: it sets what Ray is started with.
import fdconv_deploy.serve.ray  # noqa: F401  # isort: skip
import ray  # isort: skip
from ray import serve  # isort: skip

CLIENTS = 8
REPLICAS = 2
EVERY = 100  # requests, then a replica is killed


@contextmanager
def cluster(object_store_mb: int = 256) -> Iterator[int]:
    """Ray on this machine; a port that its proxy may listen on."""
    # Not ignored: what stays alive in it would be left behind. Short, for it holds Unix sockets.
    with tempfile.TemporaryDirectory(prefix="r", ignore_cleanup_errors=True) as folder:
        ray.init(
            address="local",
            num_cpus=8,
            object_store_memory=object_store_mb << 20,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="warning",
            _temp_dir=folder,
        )
        try:
            yield free_port()
        finally:
            serve.shutdown()
            ray.shutdown()


def deploy(port: int, bundle: Path, model: dict[str, Any], **arguments: Any) -> None:
    """Deploy by serve.yaml with these arguments, and options of the model's deployment."""
    config = yaml.safe_load((ROOT / "serve" / "ray" / "serve.yaml").read_text())
    config["http_options"] = {"host": "127.0.0.1", "port": port}
    (application,) = config["applications"]
    application["args"] = {"bundles": [str(bundle)], "threads": 1, "cpus": 0.5, **arguments}
    application["deployments"] = [{"name": "Model", **model}]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "serve.yaml"
        file.write_text(yaml.safe_dump(config))
        address = ray.get_runtime_context().gcs_address
        command = [sys.executable, "-m", "ray.serve.scripts", "run", str(file), "--non-blocking"]
        said = subprocess.run([*command, "--address", address], capture_output=True, text=True)
    if said.returncode:
        raise SystemExit(said.stderr)
    wanted = model.get("num_replicas", 1)
    wait(lambda: state() == "RUNNING" and len(replicas()) >= wanted, "the application runs")


def state() -> str:
    applications = serve.status().applications
    return str(applications["fdconv"].status.value) if "fdconv" in applications else ""


def replicas(kind: str = "ServeReplica:fdconv:Model") -> list[psutil.Process]:
    """Processes of Ray's actors of this kind."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error, IndexError):
            # Behind the name may stand the method that runs.
            if process.cmdline()[0].startswith(f"ray::{kind}"):
                found.append(process)
    return found


def wait(true: Callable[[], bool], what: str, seconds: float = 180.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        if time.monotonic() > end:
            raise SystemExit(f"not within {seconds:g} s: {what}; {serve.status()}")
        time.sleep(0.2)


def equal(port: int, bundle: Path, images: int) -> int:
    """How many of these random images' logits are the session's, bit for bit."""
    with open_session(bundle, threads=1) as session:
        rng, same, plug = np.random.default_rng(0), 0, Connection(port)
        for _ in range(images):
            tensor = rng.normal(size=(1, 3, *session.input_size)).astype(np.float32)
            status, headers, body = plug.post(*kserve_request(tensor, bundle.name))
            assert status == 200, body
            logits = session.run(tensor)
            same += body[int(headers["inference-header-content-length"]) :] == logits.tobytes()
        plug.close()
    return same


class Asking:
    """Clients that each ask, wait and ask again, until ``stop`` or so many requests are over."""

    def __init__(self, port: int, clients: int = CLIENTS, requests: int | None = None) -> None:
        self._port, self._ask, self._left = port, image_request(), requests
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._client, daemon=True) for _ in range(clients)]
        self.load, self.begun = Load(), 0
        for thread in self._threads:
            thread.start()

    def stop(self) -> Load:
        self._left = 0
        return self.join()

    def join(self) -> Load:
        for thread in self._threads:
            thread.join()
        return self.load

    def _next(self) -> bool:
        with self._lock:
            if self._left is not None and self.begun >= self._left:
                return False
            self.begun += 1
            return True

    def _client(self) -> None:
        plug: Connection | None = None
        while self._next():
            begin = time.perf_counter()
            try:
                plug = plug or Connection(self._port)
                status = self._ask(plug)
            except OSError:  # 0 stands for a connection that broke, or was refused
                status, plug = 0, None
                time.sleep(0.05)
            with self._lock:
                self.load.add(status, time.perf_counter() - begin)
        if plug:
            plug.close()


def killing(port: int, requests: int) -> dict[str, Any]:
    """Ask so often while every hundredth request kills a replica: by SIGKILL, or as Ray does."""
    asking, killed = Asking(port, requests=requests), 0
    while asking.begun < requests:
        found = replicas()
        if asking.begun // EVERY > killed and found:
            if killed % 2:
                names = [name for name in serve_actors() if "#Model#" in name]
                with contextlib.suppress(ValueError):  # it has just ended
                    ray.kill(ray.get_actor(random.choice(names), namespace="serve"))
            else:
                random.choice(found).send_signal(signal.SIGKILL)
            killed += 1
        time.sleep(0.005)
    load = asking.join()
    return {
        "requests": requests,
        "replicas killed": killed,
        "statuses": load.statuses(),
        "ms p50, p99, most": [round(load.percentile(p), 1) for p in (0.5, 0.99, 1)],
    }


def serve_actors() -> list[str]:
    return [
        actor["name"]
        for actor in ray.util.list_named_actors(all_namespaces=True)
        if actor["namespace"] == "serve"
    ]


def killing_one(port: int, kind: str) -> dict[str, Any]:
    """What clients see while the only process of a kind is killed, and until it is back."""
    asking = Asking(port)
    time.sleep(2)
    (victim,) = replicas(kind)
    victim.kill()
    start = time.monotonic()
    time.sleep(0.5)
    before = asking.load.count()
    wait(lambda: asking.load.count() > before + 2 * CLIENTS, f"{kind} is back")
    away = time.monotonic() - start
    return {"statuses": asking.stop().statuses(), "seconds until answers": round(away, 1)}


def scaling(port: int) -> dict[str, Any]:
    """From one replica to two under load, and back while one client goes on asking."""
    counts = [len(replicas())]
    asking = Asking(port)
    wait(lambda: len(replicas()) == 2, "two replicas under load")
    counts.append(2)
    statuses = [asking.stop().statuses()]
    asking = Asking(port, clients=1)
    wait(lambda: len(replicas()) == 1, "one replica without load")
    counts.append(1)
    statuses.append(asking.stop().statuses())
    return {"replicas": counts, "statuses": statuses}


def throughput(port: int, bundle: Path, seconds: float, turns: int) -> dict[str, Any]:
    """Images a second, of ``fdconv serve`` and of Ray, in turns."""
    ask = image_request()
    rates: dict[str, list[float]] = {"fdconv serve": [], "Ray": []}
    with server(ours(bundle, "--workers", str(REPLICAS))) as alone:
        ports = {"fdconv serve": alone.port, "Ray": port}
        for turn in range(turns + 1):
            for name, at in ports.items():
                load = closed_loop(at, ask, connections=CLIENTS, seconds=seconds)
                if turn:  # the first is for warming up
                    rates[name].append(load.per_second())
    ratios = [ray / alone for ray, alone in zip(rates["Ray"], rates["fdconv serve"], strict=True)]
    return {"images per second": rates, "Ray vs. fdconv serve": round(median(ratios), 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--full", action="store_true")
    parser.add_argument(
        "--only", nargs="*", default=["equal", "kill", "front", "speed", "scale"],
        help="Parts: equal, kill, front (the ingress and the proxy), speed, scale.",
    )  # fmt: skip
    arguments = parser.parse_args()
    bundle, full = demo_bundle(arguments.bundle).resolve(), arguments.full
    images, requests = (100, 1000) if full else (20, 300)
    result: dict[str, Any] = {"machine": machine(), "ray": ray.__version__, "replicas": REPLICAS}
    held: dict[str, bool] = {}
    with cluster() as port:
        deploy(port, bundle, {"num_replicas": REPLICAS, "autoscaling_config": None})
        if "equal" in arguments.only:
            found = result["equal to the session"] = equal(port, bundle, images)
            held[f"{images} of {images} answers are the session's, bit for bit"] = found == images
        if "speed" in arguments.only:
            speed = throughput(port, bundle, *((10.0, 5) if full else (3.0, 2)))
            result["throughput"] = speed
            held["at least 0.9 of fdconv serve"] = speed["Ray vs. fdconv serve"] >= 0.9
        if "kill" in arguments.only:
            kill = result["replicas killed"] = killing(port, requests)
            held["every request was answered with 200"] = kill["statuses"] == {200: requests}
        if "front" in arguments.only:
            for kind in ("ServeReplica:fdconv:Ingress", "ProxyActor"):
                result[f"{kind} killed"] = killing_one(port, kind)
        if "scale" in arguments.only:
            options = {"min_replicas": 1, "max_replicas": 2, "target_ongoing_requests": 2}
            delays = {"upscale_delay_s": 1, "downscale_delay_s": 5}
            deploy(port, bundle, {"autoscaling_config": {**options, **delays}}, max_replicas=2)
            wait(lambda: len(replicas()) == 1, "one replica")
            scale = result["scaling"] = scaling(port)
            only_200 = all(set(statuses) == {200} for statuses in scale["statuses"])
            held["from 1 replica to 2 and back, all answered"] = only_200
    finish("ray", result, held, keep=full)


if __name__ == "__main__":
    main()
