#!/usr/bin/env bash
# get_final_response() of openai's stream of a response that max_output_tokens has cut.
#
# One would guess: it returns the response, with status "incomplete" and the text so far, as the last event of the stream
# holds it, and as responses.create() returns it without a stream.
# What happens: it raises a RuntimeError which says that no `response.completed` event was received. The event of an answer
# that was cut is `response.incomplete`; the response is there in that event only.
# Version: openai 3.57.0. Source: this script, whose server tells the events that OpenAI's API reference lists; the
# stream's get_final_response in lib/streaming/responses/_responses.py.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet openai==3.57.0
"$folder/venv/bin/python" - <<'PYTHON'
import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import openai

PART = {"type": "output_text", "text": "Once upon", "annotations": [], "logprobs": []}
ITEM = {"type": "message", "id": "msg_1", "role": "assistant", "status": "in_progress", "content": []}
DONE = ITEM | {"status": "incomplete", "content": [PART]}
USAGE = {
    "input_tokens": 3,
    "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
    "output_tokens": 2,
    "output_tokens_details": {"reasoning_tokens": 0},
    "total_tokens": 5,
}


def response(status, output):
    cut = {"reason": "max_output_tokens"} if status == "incomplete" else None
    return {
        "id": "resp_1", "object": "response", "created_at": 1, "model": "m", "status": status, "output": output,
        "incomplete_details": cut, "error": None, "instructions": None, "metadata": {}, "parallel_tool_calls": True,
        "temperature": 1.0, "top_p": 1.0, "tool_choice": "auto", "tools": [], "usage": USAGE if cut else None,
    }  # fmt: skip


def events():
    at = {"item_id": "msg_1", "output_index": 0, "content_index": 0}
    yield "response.created", {"response": response("in_progress", [])}
    yield "response.output_item.added", {"output_index": 0, "item": ITEM}
    yield "response.content_part.added", at | {"part": PART | {"text": ""}}
    yield "response.output_text.delta", at | {"delta": "Once upon", "logprobs": []}
    yield "response.output_text.done", at | {"text": "Once upon", "logprobs": []}
    yield "response.content_part.done", at | {"part": PART}
    yield "response.output_item.done", {"output_index": 0, "item": DONE}
    yield "response.incomplete", {"response": response("incomplete", [DONE])}


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.send_response(200)
        self.send_header("content-type", "text/event-stream" if body.get("stream") else "application/json")
        self.end_headers()
        if not body.get("stream"):
            self.wfile.write(json.dumps(response("incomplete", [DONE])).encode())
            return
        for number, (name, fields) in enumerate(events()):
            data = json.dumps({"type": name, "sequence_number": number} | fields)
            self.wfile.write(f"event: {name}\ndata: {data}\n\n".encode())

    def log_message(self, *arguments):
        pass


server = HTTPServer(("127.0.0.1", 0), Handler)
threading.Thread(target=server.serve_forever, daemon=True).start()
client = openai.OpenAI(base_url=f"http://127.0.0.1:{server.server_port}/v1", api_key="none", max_retries=0)
asked = {"model": "m", "input": "Tell me a story.", "max_output_tokens": 2}
print("openai", openai.__version__)
whole = client.responses.create(**asked)
print(f"create: {whole.status}, {whole.output_text!r}")
with client.responses.stream(**asked) as stream:
    last = list(stream)[-1]
    print(f"stream, last event: {last.type}, {last.response.output[0].content[0].text!r}")
    try:
        final = stream.get_final_response()
        print("get_final_response:", final.status)
        raised = False
    except RuntimeError as error:
        print("get_final_response: RuntimeError:", error)
        raised = True
sys.exit(not raised)
PYTHON
