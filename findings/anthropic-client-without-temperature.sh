#!/usr/bin/env bash
# Sampling parameters of anthropic's Python client.
#
# One would guess: messages.create() and messages.stream() take temperature, top_p and top_k, the fields with which
# programs have drawn answers from this API for years, and which servers of the same API read.
# What happens: a TypeError, "unexpected keyword argument 'temperature'". No method has these parameters any more;
# extra_body still sends them.
# Version: anthropic 2.14.0. Source: this script; resources/messages/messages.py.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet anthropic==2.14.0
"$folder/venv/bin/python" - <<'PYTHON'
import inspect
import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import anthropic

bodies = []
ANSWER = {
    "id": "msg_1", "type": "message", "role": "assistant", "model": "m", "stop_reason": "end_turn",
    "stop_sequence": None, "content": [{"type": "text", "text": "Yes."}],
    "usage": {"input_tokens": 3, "output_tokens": 2},
}  # fmt: skip


class Server(BaseHTTPRequestHandler):
    def do_POST(self):
        bodies.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
        text = json.dumps(ANSWER).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *arguments):
        pass


server = HTTPServer(("127.0.0.1", 0), Server)
threading.Thread(target=server.serve_forever, daemon=True).start()
client = anthropic.Anthropic(base_url=f"http://127.0.0.1:{server.server_port}", api_key="none", max_retries=0)
asked = {"model": "m", "max_tokens": 8, "messages": [{"role": "user", "content": "Hello?"}]}
print("anthropic", anthropic.__version__)
names = {"temperature", "top_p", "top_k"}
for method in (client.messages.create, client.messages.stream):
    print(f"{method.__name__}:", sorted(names & set(inspect.signature(method).parameters)) or "none of", *sorted(names))
try:
    client.messages.create(**asked, temperature=0)
    outcome = "no error"
except TypeError as error:
    outcome = f"TypeError: {error}"
print("create(temperature=0):", outcome)
client.messages.create(**asked, extra_body={"temperature": 0})
print("extra_body sends:", bodies[-1].get("temperature"))
sys.exit(0 if outcome.startswith("TypeError") and bodies[-1].get("temperature") == 0 and len(bodies) == 1 else 1)
PYTHON
