"""NVIDIA's Triton beside `fdconv serve`: ``python -m benchmarks.serving.triton WHAT ...``.

WHAT is ``install`` (the server, in the folder ``--environment``), ``requests`` (1,000 to the real
Triton, compared with the session), ``differences`` (the same client calls to both, a table of what
is answered otherwise) or ``throughput`` (both on the same bundle, side by side, also as NVIDIA's
perf_analyzer sees them). Both serve one bundle: images of its own size as UINT8, masks back.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import queue
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.serving.clients.__main__ import GLIBC
from benchmarks.serving.harness import (
    demo_bundle,
    finish,
    free_port,
    machine,
    median,
    ours,
    server,
)
from benchmarks.serving.triton.server import prepare, tritonserver
from fdconv_deploy.export import export_triton
from fdconv_deploy.runtime import open_session

NAME = "streets"
CLIENTS = (1, 4, 16, 64)


@dataclass
class Service:
    """One of the two servers: addresses of REST and gRPC."""

    title: str
    http: str
    grpc: str


@contextlib.contextmanager
def both(arguments: argparse.Namespace, *triton_options: str) -> Iterator[tuple[Service, Service]]:
    """The real Triton and `fdconv serve` on the same bundle, one thread a run each."""
    with tempfile.TemporaryDirectory() as name:
        folder, grpc_port = Path(name), free_port()
        bundle = demo_bundle(arguments.bundle)
        shutil.copytree(bundle, folder / NAME)
        (model,) = export_triton(bundle, folder / "models", name=NAME)
        with (model / "config.pbtxt").open("a") as config:
            config.write('parameters { key: "threads" value { string_value: "1" } }\n')
        options = ["--grpc-port", str(grpc_port), "--model-control"]
        with (
            tritonserver(
                arguments.environment, folder / "models", folder / "log", *triton_options
            ) as (triton, address),
            server(ours(folder / NAME, *options)) as our,
        ):
            yield (
                Service("Triton", triton.url.removeprefix("http://"), address),
                Service("fdconv serve", f"127.0.0.1:{our.port}", f"127.0.0.1:{grpc_port}"),
            )


def images(bundle: Path, count: int, seed: int = 0) -> np.ndarray:
    """(count, H, W, 3) uint8 of the bundle's own size."""
    size = json.loads((bundle / "manifest.json").read_text())["input"]
    shape = (count, size["height"], size["width"], 3)
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def tensor(module: Any, array: np.ndarray, name: str = "images", kind: str = "UINT8") -> Any:
    given = module.InferInput(name, array.shape, kind)
    given.set_data_from_numpy(array)
    return given


# --- 1,000 requests


def requests(arguments: argparse.Namespace) -> None:
    """1,000 requests of eight clients, half by REST, each mask compared with the session's."""
    import tritonclient.grpc as grpc
    import tritonclient.http as http

    bundle, count = demo_bundle(arguments.bundle), arguments.count
    pictures = images(bundle, 16)
    with open_session(bundle, threads=1) as session:
        expected = [session.segment(picture).labels for picture in pictures]
    found: Counter[str] = Counter()
    with both(arguments) as (triton, _):
        local = threading.local()

        def ask(number: int) -> str:
            module, address = ((http, triton.http), (grpc, triton.grpc))[number % 2]
            if not hasattr(local, module.__name__):
                setattr(local, module.__name__, module.InferenceServerClient(address))
            client = getattr(local, module.__name__)
            at = number // 2 % len(pictures)
            answer = client.infer(NAME, [tensor(module, pictures[at : at + 1])])
            return (
                "equal" if np.array_equal(answer.as_numpy("labels")[0], expected[at]) else "other"
            )

        with ThreadPoolExecutor(8) as pool:
            found.update(pool.map(ask, range(count)))
    held = {
        f"{count} requests to the real Triton, each mask the session's": found["equal"] == count
    }
    finish(
        "triton-requests", {"machine": machine(), "answers": dict(found)}, held, keep=arguments.full
    )


def perf_analyzer(clients: Path, kind: str, service: Service, shape: tuple[int, ...]) -> str:
    """What NVIDIA's load generator prints of a service, asked for what its metadata says.

    Its binary is that of the clients' environment, which ``benchmarks.serving.clients`` makes.
    """
    command = [str(clients / "perf" / "perf_analyzer" / "bin" / "perf_analyzer")]
    library = clients / "glibc" / "usr" / "lib" / "x86_64-linux-gnu"
    if tuple(map(int, platform.libc_ver()[1].split("."))) < GLIBC:
        path = f"{library}:/usr/lib/x86_64-linux-gnu"
        command = [f"{library}/ld-linux-x86-64.so.2", "--library-path", path, *command]
    command += [
        *("-m", NAME, "-i", kind, "-u", getattr(service, kind), "--concurrency-range", "4"),
        *("--measurement-mode", "count_windows", "--measurement-request-count", "200"),
        *("--stability-percentage", "999", "--max-trials", "3"),
    ]
    if service.title == "Triton":  # of which a picture may have any size
        command += ["--shape", f"images:{','.join(map(str, shape))}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    return done.stdout + done.stderr


# --- the same calls to both


def outcome(call: Callable[[], Any]) -> Any:
    """What a client sees: the answer, or the status and the kind of its error."""
    try:
        return call()
    except Exception as error:  # whatever a client raises is what is compared
        status = getattr(error, "status", lambda: None)()
        return {"error": status or type(error).__name__, "says": str(error)}


def rest(address: str, path: str, body: bytes | None = None, method: str | None = None) -> Any:
    """Status and JSON of a plain request, without a client library."""
    request = urllib.request.Request(f"http://{address}{path}", body, method=method)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            data = answer.read()
            return {"status": answer.status, "body": json.loads(data) if data else {}}
    except urllib.error.HTTPError as error:
        data = error.read()
        with contextlib.suppress(ValueError):
            return {"status": error.code, "says": json.loads(data)}
        return {"status": error.code, "says": data.decode(errors="replace")}


def calls(kind: str, address: str, pictures: np.ndarray) -> dict[str, Callable[[], Any]]:
    """Every call that is compared, by its name."""
    from tritonclient.utils import np_to_triton_dtype

    module: Any
    if kind == "REST":
        import tritonclient.http as module
    else:
        import tritonclient.grpc as module
    options = {"as_json": True} if kind == "gRPC" else {}
    client = module.InferenceServerClient(address, **({"concurrency": 4} if kind == "REST" else {}))
    one, labels = pictures[:1], [module.InferRequestedOutput("labels")]

    def infer(
        *arrays: np.ndarray,
        names: tuple[str, ...] = ("images",),
        outputs: Any = ("labels",),
        **given: Any,
    ) -> Any:
        inputs = [
            tensor(module, array, name, np_to_triton_dtype(array.dtype))
            for name, array in zip(names, arrays, strict=True)
        ]
        wanted = [module.InferRequestedOutput(o) for o in outputs] or None
        answer = client.infer(given.pop("model", NAME), inputs, outputs=wanted, **given)
        return described(answer, module)

    def in_json() -> Any:
        given = module.InferInput("images", one.shape, "UINT8")
        given.set_data_from_numpy(one, binary_data=False)
        wanted = module.InferRequestedOutput("labels", binary_data=False)
        return described(client.infer(NAME, [given], outputs=[wanted]), module)

    def asynchronous() -> Any:
        if kind == "REST":
            given = [tensor(module, one)]
            started = [client.async_infer(NAME, given, outputs=labels) for _ in range(4)]
            return [described(each.get_result(), module) for each in started]
        done: queue.Queue[Any] = queue.Queue()
        for _ in range(4):
            given = [tensor(module, one)]
            client.async_infer(
                NAME, given, lambda result, error: done.put(error or result), outputs=labels
            )
        answers = [done.get(timeout=60) for _ in range(4)]
        return [
            str(each) if isinstance(each, Exception) else described(each, module)
            for each in answers
        ]

    def stream() -> Any:
        done: queue.Queue[Any] = queue.Queue()
        client.start_stream(lambda result, error: done.put((result, error)))
        for number, array in enumerate((one, one[..., :2])):
            client.async_stream_infer(NAME, [tensor(module, array)], request_id=str(number))
        found = [done.get(timeout=60) for _ in range(2)]
        client.stop_stream()
        kinds = ["answer" if error is None else "error" for _, error in found]
        return sorted(kinds)

    statistics = lambda: client.get_inference_statistics(NAME, **options)  # noqa: E731
    found: dict[str, Callable[[], Any]] = {
        "server live": client.is_server_live,
        "server ready": client.is_server_ready,
        "model ready": lambda: client.is_model_ready(NAME),
        "model ready, version 1": lambda: client.is_model_ready(NAME, "1"),
        "model ready, version 7": lambda: client.is_model_ready(NAME, "7"),
        "model ready, unknown": lambda: client.is_model_ready("none"),
        "server metadata": lambda: client.get_server_metadata(**options),
        "model metadata": lambda: client.get_model_metadata(NAME, **options),
        "model metadata, unknown": lambda: client.get_model_metadata("none", **options),
        "model metadata, version 7": lambda: client.get_model_metadata(NAME, "7", **options),
        "model config": lambda: client.get_model_config(NAME, **options),
        "model config, unknown": lambda: client.get_model_config("none", **options),
        "repository index": lambda: client.get_model_repository_index(**options),
        "infer": lambda: infer(one),
        "infer, 4 images": lambda: infer(pictures[:4]),
        "infer, no output named": lambda: infer(one, outputs=()),
        "infer, version 1": lambda: infer(one, model_version="1"),
        "infer, request id": lambda: infer(one, request_id="seven"),
        "infer, tensors as JSON": in_json,
        "infer, asynchronous": asynchronous,
        "infer, time limit 60 s": lambda: infer(one, timeout=60_000_000),
        "infer, priority": lambda: infer(one, priority=1),
        "infer, sequence": lambda: infer(one, sequence_id=5, sequence_start=True),
        "statistics": statistics,
        "statistics, unknown": lambda: client.get_inference_statistics("none", **options),
        "infer, image of another size": lambda: infer(one[:, :50, :70]),
        "infer, FP32 normalised": lambda: infer(np.zeros((1, 3, *one.shape[1:3]), np.float32)),
        "infer, logits": lambda: infer(one, outputs=["logits"]),
        "infer, 17 images": lambda: infer(np.repeat(one, 17, axis=0)),
        "infer, no images": lambda: infer(one[:0]),
        "infer, image without pixels": lambda: infer(one[:, :0]),
        "infer, two bands": lambda: infer(one[..., :2]),
        "infer, three dimensions": lambda: infer(one[0]),
        "infer, datatype INT32": lambda: infer(one.astype(np.int32)),
        "infer, unknown input": lambda: infer(one, names=("picture",)),
        "infer, one input too many": lambda: infer(one, one, names=("images", "more")),
        "infer, unknown output": lambda: infer(one, outputs=["masks"]),
        "infer, unknown model": lambda: infer(one, model="none"),
        "infer, version 7": lambda: infer(one, model_version="7"),
        "shared memory status": lambda: client.get_system_shared_memory_status(**options),
        "CUDA shared memory status": lambda: client.get_cuda_shared_memory_status(**options),
        "trace settings": lambda: client.get_trace_settings(NAME, **options),
        "log settings": lambda: client.get_log_settings(**options),
        "load, unknown": lambda: client.load_model("none"),
        "load with a config": lambda: client.load_model(NAME, config="{}"),
        "unload": lambda: client.unload_model(NAME),
        "unloaded: model ready": lambda: wait_for(lambda: not client.is_model_ready(NAME)),
        "unloaded: server ready": client.is_server_ready,
        "unloaded: infer": lambda: infer(one),
        "unloaded: repository index": lambda: client.get_model_repository_index(**options),
        "load": lambda: client.load_model(NAME),
        "loaded: model ready": lambda: wait_for(lambda: client.is_model_ready(NAME)),
        "loaded: infer": lambda: infer(one),
        "unload, unknown": lambda: client.unload_model("none"),
    }
    if kind == "gRPC":
        found["infer, stream of which one fails"] = stream
        return found
    infer_path, head = f"/v2/models/{NAME}/infer", one.tobytes()
    given = {"name": "images", "datatype": "UINT8", "shape": list(one.shape)}
    flat = {**given, "data": one.ravel().tolist()}
    for title, body in {
        "body: flat data": {"inputs": [flat]},
        "body: nested data": {"inputs": [{**given, "data": one.tolist()}]},
        "body: data too short": {"inputs": [{**given, "data": [1, 2]}]},
        "body: number beyond the type": {"inputs": [{**given, "data": [300] * one.size}]},
        "body: text for numbers": {"inputs": [{**given, "data": ["a"] * one.size}]},
        "body: negative shape": {"inputs": [{**flat, "shape": [-1, *one.shape[1:]]}]},
        "body: no inputs": {"inputs": []},
        "body: unknown field": {"inputs": [flat], "more": 1},
        "body: unknown parameter": {"inputs": [flat], "parameters": {"more": 1}},
        "body: input without a datatype": {
            "inputs": [{k: v for k, v in flat.items() if k != "datatype"}]
        },
    }.items():
        text = json.dumps({**body, "outputs": [{"name": "labels"}]}).encode()
        found[title] = lambda text=text: shortened(rest(address, infer_path, text))  # type: ignore[misc]
    found |= {
        "body: no JSON": lambda: rest(address, infer_path, b"{"),
        "body: empty": lambda: rest(address, infer_path, b""),
        "body: raw binary": lambda: shortened(rest(address, infer_path, head)),
        "GET of infer": lambda: rest(address, infer_path),
        "unknown address": lambda: rest(address, "/v2/nothing"),
        "statistics of all": lambda: rest(address, "/v2/models/stats"),
        "ready body": lambda: rest(address, "/v2/health/ready"),
        "index, only ready": lambda: rest(address, "/v2/repository/index", b'{"ready": true}'),
        "index, no JSON": lambda: rest(address, "/v2/repository/index", b"x"),
    }
    return found


def wait_for(condition: Callable[[], bool]) -> bool:
    """True, as soon as it is; False after a minute."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.05)
    return False


def described(answer: Any, module: Any) -> Any:
    """An answer's head, and its labels as shape, type and sum of bytes."""
    head = answer.get_response()
    if module.__name__.endswith("grpc"):
        from google.protobuf.json_format import MessageToDict

        head = MessageToDict(head, preserving_proto_field_name=True)
    names = [output["name"] for output in head["outputs"]]
    found = {}
    for name in names:
        array = answer.as_numpy(name)
        found[name] = [str(array.dtype), list(array.shape), int(array.astype(np.int64).sum())]
    rest = {k: v for k, v in head.items() if k in ("model_name", "model_version", "id")}
    return {**rest, "outputs": found}


def shortened(answer: dict[str, Any]) -> dict[str, Any]:
    """A plain answer without its numbers."""
    for output in answer.get("body", {}).get("outputs", []):
        output["data"] = [len(output["data"]), sum(output["data"])] if "data" in output else None
    return answer


def stripped(value: Any, *names: str) -> Any:
    """An answer without what differs from run to run: times, counts, request ids; and ``names``."""
    if isinstance(value, dict):
        left_out = (
            "ns",
            "count",
            "last_inference",
            "inference_count",
            "execution_count",
            "request_id",
            "detail",
            *names,
        )
        return {k: stripped(v, *names) for k, v in value.items() if k not in left_out}
    return [stripped(one, *names) for one in value] if isinstance(value, list) else value


def shape_of(value: Any) -> Any:
    """What of an answer is compared: errors may have other sentences."""
    return stripped(value, "says")


def differences(arguments: argparse.Namespace) -> None:
    """Ask both the same, print every call that is answered otherwise."""
    pictures = images(demo_bundle(arguments.bundle), 4)
    rows, total = [], 0
    with both(arguments, "--model-control-mode=explicit", f"--load-model={NAME}") as services:
        for kind in ("REST", "gRPC"):
            sides = []
            for service in services:
                address = service.http if kind == "REST" else service.grpc
                asked = calls(kind, address, pictures)
                sides.append({name: outcome(call) for name, call in asked.items()})
            total += len(sides[0])
            for name in sides[0]:
                theirs, mine = sides[0][name], sides[1][name]
                if shape_of(theirs) != shape_of(mine):
                    theirs, mine = stripped(theirs), stripped(mine)
                    rows.append({"kind": kind, "call": name, "triton": theirs, "ours": mine})
    print(
        f"{total - len(rows)} of {total} calls are answered alike. The others:\n", file=sys.stderr
    )
    print("| | call | Triton | fdconv serve |\n|---|---|---|---|", file=sys.stderr)
    for row in rows:
        theirs, mine = briefly(row["triton"], row["ours"])
        print(f"| {row['kind']} | {row['call']} | {theirs} | {mine} |", file=sys.stderr)
    result = {"machine": machine(), "calls": total, "differences": rows}
    finish("triton-differences", result, {}, keep=arguments.full)


def briefly(theirs: Any, mine: Any) -> tuple[str, str]:
    """Two answers, of dictionaries only what differs."""
    if (
        isinstance(theirs, dict)
        and isinstance(mine, dict)
        and not {"error", "status"} & (theirs.keys() | mine.keys())
    ):
        keys = [k for k in {**theirs, **mine} if shape_of(theirs.get(k)) != shape_of(mine.get(k))]
        theirs, mine = ({k: side[k] for k in keys if k in side} for side in (theirs, mine))
    texts = (json.dumps(side, default=str, ensure_ascii=False) for side in (theirs, mine))
    first, second = (text.replace("|", "\\|")[:400] for text in texts)
    return first, second


# --- side by side


def throughput(arguments: argparse.Namespace) -> None:
    """Masks a second and added latency of both in turn, by the same client program.

    Added latency: the median at one client, less the session's own median for the same image,
    measured between the two in the same run. Then perf_analyzer at four clients.
    """
    bundle = demo_bundle(arguments.bundle)
    picture = images(bundle, 1)
    about, found, alone = machine(), [], []
    with both(arguments) as services, open_session(bundle, threads=1) as session:
        session.segment(picture[0])
        for repeat in range(arguments.repeats):
            for kind in ("http", "grpc"):
                for clients in CLIENTS:
                    order = services if repeat % 2 == 0 else services[::-1]
                    for service in order:
                        rate, p50, p99 = load(
                            kind, getattr(service, kind), clients, picture, arguments.seconds
                        )
                        found.append([service.title, kind, clients, rate, p50, p99])
                    for _ in range(20):
                        start = time.perf_counter()
                        session.segment(picture[0])
                        alone.append((time.perf_counter() - start) * 1e3)
        told = {
            f"perf_analyzer, {kind}, {service.title}": perf_analyzer(
                arguments.clients.resolve(), kind, service, picture.shape[1:]
            )
            for kind in ("http", "grpc")
            for service in services
            if arguments.clients is not None
        }
    own = median(alone)
    rows = []
    for kind in ("http", "grpc"):
        for clients in CLIENTS:
            row = {"kind": kind, "clients": clients}
            for service in services:
                mine = [f[3:] for f in found if f[:3] == [service.title, kind, clients]]
                rate, p50, p99 = (median([one[at] for one in mine]) for at in range(3))
                row[service.title] = {"per_second": rate, "p50_ms": p50, "p99_ms": p99}
                if clients == 1:
                    row[service.title]["added_ms"] = p50 - own
            rows.append(row)
    kinds, added = {"http": "REST", "grpc": "gRPC"}, []
    print(
        "| | clients | Triton /s | fdconv serve /s | Triton p50 | fdconv serve p50 | Triton p99 "
        "| fdconv serve p99 |\n" + "|---" * 8 + "|",
        file=sys.stderr,
    )
    for row in rows:
        sides = [row[service.title] for service in services]
        cells = [kinds[row["kind"]], row["clients"], *(f"{s['per_second']:.1f}" for s in sides)]
        cells += [f"{side[name]:.1f} ms" for name in ("p50_ms", "p99_ms") for side in sides]
        print("| " + " | ".join(map(str, cells)) + " |", file=sys.stderr)
        if row["clients"] == 1:
            added.append([kinds[row["kind"]], *(f"{side['added_ms']:.2f} ms" for side in sides)])
    print(f"\nAdded to the session's {own:.2f} ms at one client:\n", file=sys.stderr)
    for kind, theirs, mine in added:
        print(f"- {kind}: Triton {theirs}, fdconv serve {mine}", file=sys.stderr)
    for title, text in told.items():
        found_line = re.search(r"Concurrency: .*throughput: [1-9].*", text)
        print(f"- {title}: {found_line[0] if found_line else text}", file=sys.stderr)
    held = {
        f"{kinds[row['kind']]}, {row['clients']} clients: ahead or equal (0.97)": row[
            "fdconv serve"
        ]["per_second"]
        >= 0.97 * row["Triton"]["per_second"]
        for row in rows
    }
    held |= {
        f"added latency at most Triton's, {kinds[row['kind']]}": row["fdconv serve"]["added_ms"]
        <= row["Triton"]["added_ms"]
        for row in rows
        if row["clients"] == 1
    }
    held |= {
        f"{title} measured": bool(re.search(r"throughput: [1-9]", text))
        for title, text in told.items()
    }
    result = {
        "machine": about,
        "session_ms": own,
        "runs": found,
        "rows": rows,
        "perf_analyzer": told,
    }
    finish("triton-throughput", result, held, keep=arguments.full)


def load(
    kind: str, address: str, clients: int, picture: np.ndarray, seconds: float
) -> tuple[float, float, float]:
    """Answers a second, and median and 99th percentile in ms, of clients that ask on and on."""
    if kind == "grpc":
        import tritonclient.grpc as module
    else:
        import tritonclient.http as module
    took: list[float] = []
    end = time.perf_counter() + seconds

    def ask() -> None:
        with module.InferenceServerClient(address) as client:
            given, wanted = tensor(module, picture), module.InferRequestedOutput("labels")
            while (start := time.perf_counter()) < end:
                client.infer(NAME, [given], outputs=[wanted])
                took.append((time.perf_counter() - start) * 1e3)

    begin = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        for asked in [pool.submit(ask) for _ in range(clients)]:
            asked.result()
    wall = time.perf_counter() - begin
    took.sort()
    return len(took) / wall, median(took), took[min(int(0.99 * len(took)), len(took) - 1)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["install", "requests", "differences", "throughput"])
    parser.add_argument("--environment", type=Path, required=True, help="Folder of the server.")
    parser.add_argument("--bundle", type=Path, help="A segmentor's. Default: the demo's.")
    parser.add_argument("--clients", type=Path, help="Environment of benchmarks.serving.clients.")
    parser.add_argument("--count", type=int, default=1000, help="Of requests.")
    parser.add_argument("--seconds", type=float, default=6, help="Of each load.")
    parser.add_argument("--repeats", type=int, default=3, help="Of each load.")
    parser.add_argument("--full", action="store_true", help="Keep the result.")
    arguments = parser.parse_args()
    arguments.environment = arguments.environment.resolve()
    prepare(arguments.environment)
    if arguments.what != "install":
        {"requests": requests, "differences": differences, "throughput": throughput}[
            arguments.what
        ](arguments)


if __name__ == "__main__":
    main()
