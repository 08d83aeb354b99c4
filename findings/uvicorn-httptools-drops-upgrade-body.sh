#!/bin/bash
# uvicorn 0.54.0 with its default parser httptools 0.9.0: a POST whose client offers an upgrade to HTTP/2
# (Connection: Upgrade, HTTP2-Settings; Upgrade: h2c, as Java's HttpClient and curl --http2 do on plain HTTP)
# reaches the application with an empty body, though Content-Length says 5 and the five bytes were sent. The
# server takes no upgrade, and answers as if nothing had been uploaded. With the parser h11 0.16.0 the same
# request has its body. An upload service behind it tells such clients that their image is empty.
# Seen: "httptools: 0 bytes, h11: 5 bytes". Expected: 5 with both. Exits with another status than 0 if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check \
    uvicorn==0.54.0 httptools==0.9.0 h11==0.16.0
cd "$folder"
"$folder/env/bin/python" - <<'EOF'
import socket
import threading
import time

import uvicorn

REQUEST = (
    b"POST /upload HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\n"
    b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n\r\nimage"
)


async def application(scope, receive, send):
    if scope["type"] != "http":
        return
    received = 0
    while True:
        message = await receive()
        received += len(message.get("body", b""))
        if message["type"] == "http.disconnect" or not message.get("more_body"):
            break
    body = b"%d bytes" % received
    await send({"type": "http.response.start", "status": 200,
                "headers": [(b"content-length", b"%d" % len(body))]})
    await send({"type": "http.response.body", "body": body})


def seen(parser):
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(application, http=parser, lifespan="off", log_level="critical"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    while not server.started:
        time.sleep(0.05)
    with socket.create_connection(listener.getsockname()) as client:
        client.settimeout(10)
        client.sendall(REQUEST)
        answer = client.recv(4096)
        while b"bytes" not in answer:
            answer += client.recv(4096)
    server.should_exit = True
    thread.join()
    return answer.rpartition(b"\r\n")[2].decode()


found = {parser: seen(parser) for parser in ("httptools", "h11")}
print(f"uvicorn {uvicorn.__version__}: " + ", ".join(f"{name}: {what}" for name, what in found.items()))
assert found == {"httptools": "0 bytes", "h11": "5 bytes"}, found
EOF
