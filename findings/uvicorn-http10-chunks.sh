#!/usr/bin/env bash
# uvicorn, clients of HTTP/1.0, and bodies without a length.
#
# One would guess: a client that asks in HTTP/1.0 gets a body that ends with the connection. It cannot know chunks; RFC
# 9112, section 6.1, forbids to send them to it, and uvicorn reads the version and closes the connection afterwards.
# What happens: with httptools, which uvicorn prefers, a response without content-length, such as a stream of events,
# comes in chunks all the same; with h11 it does not. Simple clients take the sizes of chunks for parts of the body.
# Versions: uvicorn 0.54.0, httptools 0.9.0, h11 0.16.0. Source: this script; uvicorn/protocols/http/httptools_impl.py,
# RequestResponseCycle.send, looks at the method and the status only.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet uvicorn==0.54.0 httptools==0.9.0 h11==0.16.0
"$folder/venv/bin/python" - <<'PYTHON'
import socket
import threading
import time
from importlib.metadata import version

import uvicorn


async def app(scope, receive, send):
    if scope["type"] == "http":
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"hello", "more_body": False})


def ask(implementation):
    server = uvicorn.Server(uvicorn.Config(app, port=0, http=implementation, log_level="error", lifespan="off"))
    threading.Thread(target=server.run, daemon=True).start()
    while not server.started:
        time.sleep(0.01)
    with socket.create_connection(server.servers[0].sockets[0].getsockname()) as connection:
        connection.sendall(b"GET / HTTP/1.0\r\nhost: x\r\n\r\n")
        received = b""
        while part := connection.recv(65536):
            received += part
    server.should_exit = True
    return received


print(", ".join(f"{name} {version(name)}" for name in ("uvicorn", "httptools", "h11")))
answers = {implementation: ask(implementation) for implementation in ("httptools", "h11")}
for implementation, received in answers.items():
    print(f"{implementation}: {received!r}")
chunked = {name: b"transfer-encoding: chunked" in received.lower() for name, received in answers.items()}
raise SystemExit(0 if chunked == {"httptools": True, "h11": False} else f"the behaviour has changed: {chunked}")
PYTHON
