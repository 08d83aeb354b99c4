"""The whole OpenAPI by schemathesis: ``python -m benchmarks.serving.schema [--full]``.

``pip install '.[load]'``. Requests are made from the document: its examples, its
edges, drawn ones that fit it and drawn ones that do not, and sequences of calls. Three passes:
with drawn names of models, which mostly do not exist; with the served one's, to get past them;
and over the repository's control, which other passes would find the model unloaded by.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.serving.harness import Server, demo_bundle, finish, machine, ours, server

# 504: a client that allows 1 ms is answered so, which is no fault of the service.
# 4xx: an address or headers too long are refused before anybody looks at the rest.
CONFIG = """
[checks.not_a_server_error]
expected-statuses = ["2xx", "3xx", "4xx", "504"]
[checks.negative_data_rejection]
expected-statuses = ["4xx", "5xx"]
"""
NAMES = """
[parameters]
"path.name" = "{name}"
"path.version" = "1"
"""
CONTROL = "^/v2/repository"
SEED, SECONDS = "20261125", "20"


def check(found: Server, config: str, examples: int, *options: str) -> dict:
    """Run schemathesis over a service; what its report says."""
    with tempfile.TemporaryDirectory() as folder:
        settings, report = Path(folder) / "schemathesis.toml", Path(folder) / "report.json"
        settings.write_text(config)
        command = [
            *(sys.executable, "-m", "schemathesis.cli", "--config-file", str(settings)),
            *("run", f"http://127.0.0.1:{found.port}/openapi.json", "--checks", "all"),
            # No schema can say which bytes are an image, so valid requests are refused.
            *("--exclude-checks", "positive_data_acceptance", "--max-examples", str(examples)),
            *("--seed", SEED, "--request-timeout", SECONDS),
            *("--report", "json", "--report-json-path", str(report), *options),
        ]
        ended = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        if not report.is_file():
            raise SystemExit(f"schemathesis did not run: {ended.stderr[-500:]}")
        if ended.returncode:
            print("\n".join(line[:400] for line in ended.stdout.splitlines()), file=sys.stderr)
        told = json.loads(report.read_text())
    return {
        "exit code": ended.returncode,
        "operations": told["operations"]["tested"],
        "of": told["operations"]["total"],
        "test cases": told["test_cases"]["generated"],
        "failures": told["failures"],
        "errors": told["errors"],
        "seconds": round(told["running_time"], 1),
        "schemathesis": told["schemathesis_version"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--full", action="store_true", help="200 examples per operation.")
    arguments = parser.parse_args()
    bundle = demo_bundle(arguments.bundle)
    most = 200 if arguments.full else 10
    named = CONFIG + NAMES.format(name=bundle.name)
    passes, about = {}, machine()
    with server(ours(bundle)) as found:
        passes["drawn names"] = check(found, CONFIG, most, "--exclude-path-regex", CONTROL)
        passes["served names"] = check(found, named, most, "--exclude-path-regex", CONTROL)
    with server(ours(bundle, "--model-control")) as found:
        passes["repository control"] = check(found, named, most, "--include-path-regex", CONTROL)
    result = {"machine": about, "examples per operation, at most": most, "passes": passes}
    held = {
        f"{name}: all operations tested, none fails": not told["exit code"] and not told["failures"]
        for name, told in passes.items()
    }
    finish("schema", result, held, keep=arguments.full)


if __name__ == "__main__":
    main()
