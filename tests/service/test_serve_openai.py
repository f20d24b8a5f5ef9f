"""OpenAI's own client against the service, and what it may not ask."""

import base64
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from serving import StandIn, app_over, client_of, live, png

from medmoe_edge.bedside.serve.settings import Limits
from medmoe_edge.bundle.bundle import NOTICE
from medmoe_edge.errors import BundleError

TOKEN = "0123456789abcdef"
URL = "data:image/png;base64," + base64.b64encode(png(20, 10)).decode()


def about(url: str, text: str = "Is there effusion?", role: str = "user") -> dict[str, Any]:
    """A message with an image."""
    image = {"type": "image_url", "image_url": {"url": url}}
    return {"role": role, "content": [{"type": "text", "text": text}, image]}


@pytest.fixture(scope="module")
def engine() -> StandIn:
    return StandIn()


@pytest.fixture(scope="module")
def client(engine: StandIn) -> Iterator[openai.OpenAI]:
    with (
        live(engine, token=TOKEN) as url,
        openai.DefaultHttpxClient(trust_env=False) as http,
        openai.OpenAI(
            base_url=f"{url}/v1", api_key=TOKEN, http_client=http, max_retries=0
        ) as client,
    ):
        yield client


def ask(client: openai.OpenAI, *messages: dict[str, Any], **options: Any) -> Any:
    values = {"model": "stand-in", "messages": list(messages), **options}
    return client.chat.completions.create(**values)


def test_the_client_gets_an_answer(client: openai.OpenAI, engine: StandIn) -> None:
    completion = ask(client, about(URL), temperature=0.2, max_tokens=30)
    (choice,) = completion.choices
    assert (choice.message.role, choice.message.content) == ("assistant", "No effusion is seen")
    assert choice.finish_reason == "stop"
    assert completion.object == "chat.completion"
    assert (completion.usage.prompt_tokens, completion.usage.completion_tokens) == (3, 1)
    assert completion.model_extra["medmoe"]["notice"] == NOTICE
    assert engine.images[-1] == (10, 20, 3)


def test_the_client_gets_a_stream(client: openai.OpenAI) -> None:
    options = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(ask(client, about(URL), max_completion_tokens=2, **options))
    deltas = [choice.delta.content or "" for chunk in chunks for choice in chunk.choices]
    assert "".join(deltas) == "No effusion"
    assert deltas[0] == ""
    assert chunks[0].choices[0].delta.role == "assistant"
    reasons = [choice.finish_reason for chunk in chunks for choice in chunk.choices]
    assert reasons[-1] == "length"
    assert set(reasons[:-1]) == {None}
    assert chunks[-1].usage.total_tokens == 4
    assert len({chunk.id for chunk in chunks}) == 1


def test_the_last_question_is_about_the_last_image(client: openai.OpenAI, engine: StandIn) -> None:
    earlier = "data:image/png;base64," + base64.b64encode(png(3, 3)).decode()
    completion = ask(
        client,
        {"role": "system", "content": "Be brief."},
        about(earlier, "What is it?"),
        {"role": "assistant", "content": "A scan."},
        about(URL, "And this?"),
        {"role": "assistant", "content": None},
        {"role": "user", "content": "Is there a mass?"},
    )
    assert completion.model_extra["medmoe"]["question"] == "Is there a mass?"
    assert engine.images[-1] == (10, 20, 3)


def test_the_client_lists_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["stand-in", "stand-in-modality"]


@pytest.mark.parametrize(
    ("messages", "options", "kind", "code"),
    [
        ([about("https://example.org/scan.png")], {}, openai.BadRequestError, "bad_image"),
        ([about("file:///etc/passwd")], {}, openai.BadRequestError, "bad_image"),
        ([about("data:image/png;base64,####")], {}, openai.BadRequestError, "bad_image"),
        ([about("data:image/png,abc")], {}, openai.BadRequestError, "bad_image"),
        ([about("data:;base64,")], {}, openai.BadRequestError, "bad_image"),
        ([about(URL, " ")], {}, openai.BadRequestError, "bad_input"),
        ([about(URL, role="assistant")], {}, openai.BadRequestError, "bad_input"),
        ([{"role": "user", "content": "Hi"}], {}, openai.BadRequestError, "bad_image"),
        ([about(URL)], {"model": "gpt-4o"}, openai.NotFoundError, "model_not_found"),
        ([about(URL)], {"max_tokens": 5000}, openai.BadRequestError, "too_many_tokens"),
        ([about(URL)], {"n": 2}, openai.UnprocessableEntityError, "invalid_request"),
        ([], {}, openai.UnprocessableEntityError, "invalid_request"),
        (
            [{"role": "user", "content": [{"type": "input_audio"}]}],
            *({}, openai.UnprocessableEntityError, "invalid_request"),
        ),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_the_client_understands_refusals(
    client: openai.OpenAI,
    messages: list[dict[str, Any]],
    options: dict[str, Any],
    kind: type[openai.APIStatusError],
    code: str,
    stream: bool,
) -> None:
    with pytest.raises(kind) as raised:
        ask(client, *messages, **options, stream=stream)
    assert raised.value.code == code
    body: Any = raised.value.body
    assert body["remedy"]


def test_the_client_sees_a_stream_fail(client: openai.OpenAI, engine: StandIn) -> None:
    engine.error = BundleError("The model is no good.", "Export it again.")
    try:
        with pytest.raises(openai.APIError, match="The model is no good"):
            list(ask(client, about(URL), stream=True))
    finally:
        engine.error = None


def test_the_client_needs_the_token(client: openai.OpenAI) -> None:
    with pytest.raises(openai.AuthenticationError):
        ask(client.with_options(api_key="another"), about(URL))


def test_a_large_image_is_too_large() -> None:
    body = {"model": "stand-in", "messages": [about(URL + "A" * 2000)]}
    with client_of(app_over(StandIn(), limits=Limits(upload_bytes=1000))) as client:
        response = client.post("/v1/chat/completions", json=body)
    assert response.status_code == 413
    assert response.json()["error"]["code"] == "too_large"
