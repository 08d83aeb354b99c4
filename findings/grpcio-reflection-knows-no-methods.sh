#!/bin/bash
# grpcio-reflection 1.81.1 with protobuf 6.33.6: file_containing_symbol of a method is answered NOT_FOUND. The protocol's
# own comment gives "<package>.<service>[.<method>]" as names to ask for, and grpcurl's "describe package.Service.Method"
# asks so. The servicer passes the name to DescriptorPool.FindFileContainingSymbol, which finds services, messages,
# fields and enum values with protobuf's upb, but no methods.
# Reported in 2023 as grpc/grpc#34743, open.
# Seen: the service, a message and a field are found, the method "error 5". Expected: all four in health.proto.
# Exits with another status than 0 if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check \
    grpcio==1.81.1 grpcio-reflection==1.81.1 grpcio-health-checking==1.81.1 protobuf==6.33.6
"$folder/env/bin/python" - <<'EOF'
from concurrent.futures import ThreadPoolExecutor

import grpc
from grpc_health.v1 import health, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2, reflection_pb2_grpc

server = grpc.server(ThreadPoolExecutor(2))
health_pb2_grpc.add_HealthServicer_to_server(health.HealthServicer(), server)
reflection.enable_server_reflection([health.SERVICE_NAME, reflection.SERVICE_NAME], server)
port = server.add_insecure_port("127.0.0.1:0")
server.start()
names = ["Health", "HealthCheckRequest", "HealthCheckRequest.service", "Health.Check"]
requests = [
    reflection_pb2.ServerReflectionRequest(file_containing_symbol=f"grpc.health.v1.{name}")
    for name in names
]
with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    answers = stub.ServerReflectionInfo(iter(requests))
    found = {name: answer.error_response.error_code for name, answer in zip(names, answers)}
server.stop(0)
for name, code in found.items():
    print(f"{name}: {f'error {code}' if code else 'found'}")
if list(found.values()) != [0, 0, 0, 5]:
    raise SystemExit("the method is found, too: this finding is over")
EOF
