"""Requests that nobody would think of, made by Schemathesis from the server's own description: never a fault of the server,
and every answer as the description has it.

NEXTWORD_CASES says how many there are altogether; `make soak` asks for many.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

from served import ThreadedServer, running_server

schemathesis = pytest.importorskip("schemathesis", reason="needs schemathesis")
UNHURRIED: list[HealthCheck] = list(HealthCheck)  # pyright: ignore[reportAssignmentType]
checks = pytest.importorskip("schemathesis.specs.openapi.checks", reason="needs schemathesis")
PROMISED = [
    schemathesis.checks.not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_headers_conformance,
    checks.response_schema_conformance,
]
CASES = int(os.environ.get("NEXTWORD_CASES", "80"))


@pytest.fixture(scope="module")
def server(base: Path) -> Iterator[ThreadedServer]:
    with running_server(base, max_batch=4) as server:
        yield server


def shortened(body: Any) -> None:
    """The same request for fewer tokens, so that many fit into a test."""
    if isinstance(body, dict):
        for name in ("max_tokens", "max_completion_tokens"):
            if isinstance(body.get(name), int) and body[name] > 8:
                body[name] = 8


def test_no_request_makes_the_server_fail(server: ThreadedServer) -> None:
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    operations = [result.ok() for result in schema.get_all_operations()]
    assert len(operations) >= 10
    statuses: dict[int, int] = {}
    fine, wrong = schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE
    # Those that only read have nothing that could be varied.
    writing = [operation for operation in operations if operation.method == "post"]
    plan = [(one, fine, 1) for one in operations if one not in writing]
    plan += [(one, mode, max(1, CASES // len(writing) // 2)) for one in writing for mode in (fine, wrong)]
    for operation, mode, count in plan:

        @settings(max_examples=count, deadline=None, database=None, suppress_health_check=UNHURRIED)
        @given(case=operation.as_strategy(generation_mode=mode))
        def ask(case: Any) -> None:
            shortened(case.body)
            answer = case.call(timeout=30)
            statuses[answer.status_code] = statuses.get(answer.status_code, 0) + 1
            assert answer.status_code < 500, (case.as_curl_command(), answer.text)
            case.validate_response(answer, checks=PROMISED)
            if answer.status_code >= 400:
                assert set(answer.json()["error"]) == {"message", "type", "param", "code"}

        ask()
    assert server.get("/health").status == 200 and server.service.worker.num_active == 0
    assert statuses.get(200, 0) > 10 and statuses.get(400, 0) > 10
    print(f"\n{sum(statuses.values())} requests, by the status of their answers: {statuses}")
