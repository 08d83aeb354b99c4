"""SIGTERM under load: ``python -m benchmarks.serving.shutdown [--full]``.

Eight clients ask without pause while the service is told to stop, again and again. A request
counts as lost when its connection was open, the request was sent, and no whole answer came. A
connection that is refused afterwards is not a request: nobody listens any more.
"""

from __future__ import annotations

import argparse
import signal
import threading
import time
from pathlib import Path

from benchmarks.serving.harness import Connection, demo_bundle, machine, ours, scene, server, write

HEADERS = {"Content-Type": "image/jpeg", "Accept": "image/png"}
CLIENTS = 8


def once(bundle: Path, body: bytes, wait: float) -> dict[str, int]:
    counts = {"answered": 0, "turned away": 0, "lost": 0}
    lock = threading.Lock()
    with server(ours(bundle)) as found:

        def client() -> None:
            while True:
                try:
                    plug = Connection(found.port)
                except OSError:
                    return  # nobody listens any more
                while True:
                    try:
                        status = plug.post("/v1/segment", body, HEADERS)[0]
                    except ConnectionRefusedError:
                        # Answered, with "Connection: close"; nobody listened to the next.
                        with lock:
                            counts["answered"] += 1
                        return
                    except OSError:
                        with lock:
                            counts["lost"] += 1
                        return
                    with lock:
                        counts["answered" if status == 200 else "turned away"] += 1

        threads = [threading.Thread(target=client) for _ in range(CLIENTS)]
        for thread in threads:
            thread.start()
        time.sleep(wait)
        found.process.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join()
        counts["exit code"] = found.process.wait(60)
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--full", action="store_true", help="20 times.")
    arguments = parser.parse_args()
    bundle, body, about = demo_bundle(arguments.bundle), scene(), machine()
    runs = [
        once(bundle, body, 0.5 + 0.037 * number) for number in range(20 if arguments.full else 3)
    ]
    total = {name: sum(run[name] for run in runs) for name in runs[0]}
    write(
        "shutdown",
        {"machine": about, "clients": CLIENTS, "runs": runs, "total": total},
        keep=arguments.full,
    )


if __name__ == "__main__":
    main()
