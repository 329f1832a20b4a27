"""Answer a file of requests in OpenAI's batch format, one output line per request, resumable at any point.

Input, one JSON object per line (https://platform.openai.com/docs/guides/batch)::

    {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": [...]}}

Output, in the order in which answers finish::

    {"id": "batch_req_...", "custom_id": "a",
     "response": {"status_code": 200, "request_id": "req_...", "body": {...}}, "error": null}

A request that is refused or fails has ``status_code`` 400 and ``body.error``, as in OpenAI's error files. A line that
is no request at all (broken JSON, no ``custom_id``, unknown ``url`` ...) has ``response: null`` and ``error``. Both
errors carry ``code``, ``message``, ``param`` and, beyond OpenAI's form, ``line``: the line number in the input.

Any ``model`` in a body is accepted, because batch files are written for a hosted model more often than for ours; the
answer names the model that gave it.
"""

from gossamer.batch.runner import BatchRunner, BatchSummary

__all__ = ["BatchRunner", "BatchSummary"]
