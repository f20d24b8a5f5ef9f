"""What programs written for Ollama send (Open WebUI's calls), and what they get."""

import base64
import json
from collections.abc import Iterator
from typing import Any

import pytest
from serving import StandIn, app_over, client_of, png
from starlette.testclient import TestClient

from medmoe_edge.bundle.bundle import NOTICE
from medmoe_edge.errors import Notice

IMAGE = base64.b64encode(png(20, 10)).decode()
TURN = {"role": "user", "content": "Is there effusion?", "images": [IMAGE]}


@pytest.fixture
def client() -> Iterator[TestClient]:
    with client_of(app_over(StandIn())) as client:
        yield client


def ask(client: TestClient, **options: Any) -> Any:
    body = {"model": "stand-in:latest", "messages": [TURN], **options}
    return client.post("/api/chat", json=body)


def test_a_program_finds_the_model(client: TestClient) -> None:
    (found,) = client.get("/api/tags").json()["models"]
    assert (found["name"], found["digest"]) == ("stand-in:latest", "0" * 64)
    shown = client.post("/api/show", json={"model": found["name"]}).json()
    assert "vision" in shown["capabilities"]
    assert client.post("/api/show", json={"model": "llama3"}).status_code == 404
    assert client.get("/api/version").json()["version"]
    (loaded,) = client.get("/api/ps").json()["models"]
    assert found.items() <= loaded.items()


def test_answers_come_line_by_line_unless_all_at_once_is_asked_for(client: TestClient) -> None:
    response = ask(client)
    assert response.headers["content-type"] == "application/x-ndjson"
    lines = [json.loads(line) for line in response.text.splitlines()]
    assert "".join(line["message"]["content"] for line in lines) == "No effusion is seen"
    assert [line["done"] for line in lines] == [False] * (len(lines) - 1) + [True]
    assert lines[-1]["done_reason"] == "stop"
    whole = ask(client, stream=False).json()
    assert whole["message"] == {"role": "assistant", "content": "No effusion is seen"}
    assert whole["prompt_eval_count"] == 3
    assert whole["medmoe"]["notice"] == NOTICE


@pytest.mark.parametrize("stream", [False, True])
def test_an_unsure_answer_is_called_so(stream: bool) -> None:
    engine, notice = StandIn(), Notice("not_a_scan", "It is a cat.")
    engine.changes = {"unsure": True, "warnings": (notice,)}
    with client_of(app_over(engine)) as client:
        lines = [json.loads(line) for line in ask(client, stream=stream).text.splitlines()]
    told = "".join(line["message"]["content"] for line in lines)
    if stream:
        doubt = "Unsure: this is a best guess. It is a cat."
        assert told == f"No effusion is seen\n\n{doubt}"
    else:
        assert told == "It is a cat. Unsure. Best guess: No effusion is seen"
    assert lines[-1]["medmoe"]["unsure"] is True


def test_options_have_their_effect_or_are_said_to_have_none(client: TestClient) -> None:
    options = {"num_predict": 2, "temperature": 0.8, "seed": 1}
    found = ask(client, stream=False, options=options).json()
    assert (found["message"]["content"], found["done_reason"]) == ("No effusion", "length")
    (notice,) = found["medmoe"]["warnings"]
    assert notice["code"] == "options_not_applied"
    likeliest = "not applied, as the model always takes the most likely token."
    assert notice["message"] == f"seed, temperature: {likeliest}"
    options = {"num_predict": -1, "X": 1, "top_k": 4, "num_ctx": 9, "repeat_penalty": 1.1}
    found = ask(client, stream=False, think=True, options=options).json()
    assert [notice["message"] for notice in found["medmoe"]["warnings"]] == [
        f"top_k: {likeliest}",
        "think: not applied, as the model does not think aloud.",
        "num_ctx, repeat_penalty, others: not applied.",
    ]
    turn = TURN | {"thinking": "hm"}
    (notice,) = ask(client, stream=False, messages=[turn]).json()["medmoe"]["warnings"]
    assert notice["code"] == "message_fields_not_used"
    for stream in (False, True):  # nothing is left of the answer, and that is what is told
        lines = ask(client, stream=stream, options={"stop": ["No"]}).text.splitlines()
        assert json.loads(lines[-1])["message"]["content"] == ""
    stopped = ask(client, stream=False, options={"stop": [" is"]}).json()
    assert stopped["message"]["content"] == "No effusion"
    form = {"type": "object", "properties": {"effusion": {"type": "boolean"}}}
    for stream in (False, True):
        lines = ask(client, stream=stream, format=form).text.splitlines()
        assert json.loads(json.loads(lines[-1])["message"]["content"]) == {"effusion": False}


@pytest.mark.parametrize(
    ("options", "status", "code"),
    [
        ({"model": "llama3"}, 404, "model_not_found"),
        ({"messages": []}, 422, "invalid_request"),
        ({"messages": [{"role": "user", "content": "Hi"}]}, 400, "bad_image"),
        ({"messages": [{**TURN, "images": ["####"]}]}, 400, "bad_image"),
        ({"tools": [{"type": "function"}]}, 400, "unsupported_parameter"),
        ({"options": {"stop": 7}}, 400, "invalid_request"),
        ({"options": {"num_predict": "2"}}, 400, "invalid_request"),
        ({"logprobs": True}, 400, "unsupported_parameter"),
    ],
)
def test_what_cannot_be_done_is_refused(
    client: TestClient, options: dict[str, Any], status: int, code: str
) -> None:
    response = ask(client, **options)
    assert (response.status_code, response.json()["error"]["code"]) == (status, code)
