"""What the OpenAPI document promises, tried by schemathesis: no answer is a failure of the server."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from running_server import Running

if TYPE_CHECKING:  # it takes seconds to import, in every process that collects tests
    import schemathesis

CASES = int(os.environ.get("GOSSAMER_SCHEMA_CASES", "10"))  # for each operation, right and wrong ones each


def operations(server: Running) -> list[schemathesis.schemas.APIOperation]:
    import schemathesis

    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    return [result.ok() for result in schema.get_all_operations()]


def try_cases(cases: st.SearchStrategy[schemathesis.Case]) -> int:
    """How many were tried, none of which made the server fail."""
    from schemathesis.checks import content_type_conformance, not_a_server_error

    tried = 0

    @settings(max_examples=CASES, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(cases)
    def check(case: schemathesis.Case) -> None:
        nonlocal tried
        tried += 1
        response = case.call(timeout=60)
        assert response.status_code < 500, (case.as_curl_command(), response.text)
        case.validate_response(response, checks=[not_a_server_error, content_type_conformance])

    check()
    return tried


@pytest.mark.parametrize("kind", ["positive", "negative"])
def test_no_request_makes_the_server_fail(server: Running, kind: str) -> None:
    from schemathesis import GenerationMode

    mode = GenerationMode(kind)
    found = operations(server)
    assert {operation.path for operation in found} >= {"/v1/completions", "/v1/chat/completions", "/v1/batches"}
    tried = 0
    for operation in found:
        if mode is GenerationMode.NEGATIVE and not operation.body:
            continue  # nothing about it can be wrong
        tried += try_cases(operation.as_strategy(generation_mode=mode))
    assert tried > CASES
    print(f"{tried} cases over {len(found)} operations")
    server.wait_idle()
