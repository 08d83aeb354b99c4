#!/bin/bash
# nvidia-pytriton 0.7.0: ModelClient.from_existing_client of a client of "grpc://localhost:8001" gives a client that speaks
# HTTP to that port, since the scheme is cut off the address that it copies. FuturesModelClient("grpc://…") makes the
# clients of its workers so once the first has read the model's config: with more than one worker some answers are
# HTTPParseError, "Expected HTTP/, RTSP/ or ICE/".
# Seen: tritonclient.grpc, copied as tritonclient.http. Expected: gRPC twice. Needs no server. Exits with another status
# than 0 if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check nvidia-pytriton==0.7.0 tritonclient==2.73.0
"$folder/env/bin/python" -W ignore - <<'EOF'
from pytriton.client import ModelClient

client = ModelClient("grpc://localhost:8001", "model", lazy_init=True)
copy = ModelClient.from_existing_client(client)
kinds = [type(one._infer_client).__module__.rpartition(".")[0] for one in (client, copy)]
print(f"{kinds[0]}, copied as {kinds[1]}")
if kinds != ["tritonclient.grpc", "tritonclient.http"]:
    raise SystemExit("the copy is no HTTP client any more: this finding is over")
EOF
