"""Requests made from the OpenAPI document, right and wrong ones: no 5xx, nothing that is not documented."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from mtserve.serve.app import make_app
from mtserve.serve.front import Front
from mtserve.serve.table import Root, TaskTable

CHECKS = [
    not_a_server_error,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
]


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
def test_no_request_breaks_the_contract(table: TaskTable, assets: Path, mode: GenerationMode) -> None:
    root = Root(table)
    schema = schemathesis.openapi.from_asgi("/openapi.json", Front(make_app(root, assets=assets), root=root))
    asked = []
    for found in schema.get_all_operations():
        operation = found.ok()
        if mode is GenerationMode.NEGATIVE and not operation.body:
            continue

        @settings(max_examples=15, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        @given(case=operation.as_strategy(generation_mode=mode))
        def check(case: Any) -> None:
            case.call_and_validate(checks=CHECKS)

        check()
        asked.append(operation.label)
    assert {"POST /tasks/topic", "POST /tasks/forth", "POST /predict"} <= set(asked)
