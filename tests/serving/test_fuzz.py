"""Requests made at random from the OpenAPI page are answered, and never by an error inside."""

import pytest
from hypothesis import HealthCheck, given, settings
from starlette.testclient import TestClient

import moeret
from moeret.config import ServeConfig
from moeret.serving.app import make_app

schemathesis = pytest.importorskip("schemathesis")


@pytest.fixture(scope="module")
def client(index_folder):
    config = ServeConfig(reload_every=0, most_bytes=10_000)
    with TestClient(make_app(moeret.Retriever.load(index_folder), config), raise_server_exceptions=False) as client:
        yield client


@pytest.mark.parametrize("valid", [True, False], ids=["valid", "invalid"])
@pytest.mark.parametrize("path", ["/search", "/route", "/embed", "/v1/embeddings"])
def test_no_request_is_answered_by_an_error_inside(client, path, valid):
    operation = schemathesis.openapi.from_dict(client.get("/openapi.json").json())[path]["POST"]
    mode = schemathesis.GenerationMode.POSITIVE if valid else schemathesis.GenerationMode.NEGATIVE

    @settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[*HealthCheck])
    @given(case=operation.as_strategy(generation_mode=mode))
    def ask(case):
        body = {"content": case.body} if isinstance(case.body, bytes) else {"json": case.body}
        answer = client.post(path, headers=dict(case.headers or {}), **body)
        assert answer.status_code < 500, answer.text

    ask()
