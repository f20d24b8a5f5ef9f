"""Requests made from the service's own OpenAPI document: none fails on our side."""

import base64
from collections import Counter
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    response_schema_conformance,
    status_code_conformance,
)
from serving import StandIn, live, png

CHECKS: list[Any] = [not_a_server_error, response_schema_conformance, status_code_conformance]
PICTURES = [png(), png(3, 5), png()[:50]]  # random bytes would all be refused for one reason

CHAT = "/v1/chat/completions"
OLLAMA = "/api/chat"
MODELS = {CHAT: "ChatRequest", OLLAMA: "OllamaChat"}  # in the document
HARMLESS = {"user", "metadata", "store", "service_tier", "safety_identifier", "keep_alive"}
SLOW = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]


def make_sensible(path: str, body: dict[str, Any], picture: bytes) -> None:
    """Give a request what no document can tell: a picture, and the model's name."""
    encoded = base64.b64encode(picture).decode()
    turn: dict[str, Any] = {"role": "user"}
    if path == OLLAMA:
        turn |= {"content": "Is there effusion?", "images": [encoded]}
        body |= {"model": "stand-in", "messages": [*body["messages"], turn]}
    elif path == CHAT:
        url = f"data:image/png;base64,{encoded}"
        image = {"type": "image_url", "image_url": {"url": url}}
        text = {"type": "text", "text": "Is there effusion?"}
        turn |= {"content": [text, image]}
        body |= {"model": "stand-in", "messages": [*body["messages"], turn]}
    elif "image" in body:
        body["image"] = picture


def check_nothing_ignored(path: str, body: dict[str, Any], known: set[str], told: str) -> None:
    """What an answered chat had beside what is known, the answer says to be without effect."""
    beside = {name for name, value in body.items() if value and name not in known | HARMLESS}
    assert not beside or all(name in told for name in beside), f"{path} ignored {beside}"
    turns = [name for turn in body["messages"] for name, value in turn.items() if value]
    if set(turns) - {"role", "content", "images"}:
        assert "message_fields_not_used" in told


def asked(url: str, mode: GenerationMode, examples: int) -> Counter[tuple[str, int]]:
    """Sends what fits the document, or what does not; counts the paths and statuses seen."""
    seen = Counter[tuple[str, int]]()
    document = schemathesis.openapi.from_url(f"{url}/openapi.json")
    operations: list[Any] = [found.ok() for found in document.get_all_operations()]  # type: ignore[union-attr]
    for operation in operations:
        if mode is GenerationMode.NEGATIVE and operation.method != "post":
            continue  # nothing that could be wrong

        @given(operation.as_strategy(generation_mode=mode), st.sampled_from(PICTURES))
        @settings(max_examples=examples, deadline=None, suppress_health_check=SLOW)
        def answers(case: Any, picture: bytes) -> None:
            if mode is GenerationMode.POSITIVE and isinstance(case.body, dict):
                make_sensible(case.path, case.body, picture)
            response = case.call()
            case.validate_response(response, checks=CHECKS)
            if case.path in MODELS and response.status_code == 200:
                model = document.raw_schema["components"]["schemas"][MODELS[case.path]]
                known = set(model["properties"])
                check_nothing_ignored(case.path, case.body, known, response.text)
            seen[case.path, response.status_code] += 1

        answers()
    return seen


@pytest.mark.parametrize("mode", GenerationMode)
def test_no_request_fails_on_our_side(mode: GenerationMode) -> None:
    with live(StandIn()) as url:
        seen = asked(url, mode, examples=8)
    if mode is GenerationMode.POSITIVE:
        answered = {path for path, status in seen if status == 200}
        assert answered >= {"/v1/ask", "/v1/classify", "/v1/locate", "/v1/models", "/api/tags"}
        assert {(CHAT, 400), (OLLAMA, 400)} <= seen.keys() or {CHAT, OLLAMA} <= answered
    else:
        assert {("/v1/ask", 422), (CHAT, 422)} <= seen.keys()
