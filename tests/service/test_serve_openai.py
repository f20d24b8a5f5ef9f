"""OpenAI's own client against the service, and what it may not ask."""

import base64
import json
from collections.abc import Iterator
from typing import Any, Literal

import jsonschema
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel
from serving import StandIn, app_over, client_of, live, png

from medmoe_edge.bedside.serve.forms import Unfit, Until, fitted
from medmoe_edge.bedside.serve.settings import Limits
from medmoe_edge.bundle.bundle import NOTICE
from medmoe_edge.engine.answer import YES_NO
from medmoe_edge.errors import BundleError, Notice

TOKEN = "0123456789abcdef"
URL = "data:image/png;base64," + base64.b64encode(png(20, 10)).decode()


TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}


def schema_of(schema: dict[str, Any]) -> dict[str, Any]:
    """The `response_format` for a schema."""
    return {"type": "json_schema", "json_schema": {"name": "found", "schema": schema}}


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


def test_what_does_not_reach_the_model_is_said(client: openai.OpenAI) -> None:
    """History, several images, a system's words, and parameters of sampling."""
    turns = [
        {"role": "system", "content": "Be brief."},
        about(URL, "What is it?"),
        {"role": "assistant", "content": "A scan."},
        about(URL, "And this?"),
    ]
    said = ask(client, *turns, temperature=0, seed=7).model_extra["medmoe"]["warnings"]
    assert [each["code"] for each in said] == [
        *("system_prompt_not_used", "history_not_used", "images_not_used"),
        "parameters_without_effect",
    ]
    assert said[-1]["message"].startswith("seed, temperature:")
    fine: Any = about(URL) | {"name": "ward"}
    fine["content"][-1]["image_url"]["detail"] = "high"
    (said,) = ask(client, fine).model_extra["medmoe"]["warnings"]
    assert said["code"] == "message_fields_not_used"
    assert said["message"].startswith("detail, name:")
    assert ask(client, about(URL), user="ward").model_extra["medmoe"]["warnings"] == []


def test_a_parameter_that_cannot_be_honoured_is_named(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as raised:
        ask(client, about(URL), logit_bias={"1": 100})
    assert raised.value.param == "logit_bias"
    assert ask(client, about(URL), tools=[], tool_choice="none").choices  # as if not given
    with pytest.raises(openai.UnprocessableEntityError, match=r"stream_options\.continuous: There"):
        ask(client, about(URL), stream=True, stream_options={"continuous": True})
    with pytest.raises(openai.BadRequestError) as raised:
        ask(client, about(URL), extra_query={"temperature": 1})
    assert raised.value.code == "unsupported_parameter"


@pytest.mark.parametrize(
    ("stop", "text", "reason"),
    [
        ("effusion", "No ", "stop"),
        (["nothing", " is"], "No effusion", "stop"),
        ("usion is s", "No eff", "stop"),  # across words
        ("seen today", "No effusion is seen", "stop"),
        ("", "No effusion is seen", "stop"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_ends_before_a_stop_word(
    client: openai.OpenAI, stop: Any, text: str, reason: str, stream: bool
) -> None:
    found = ask(client, about(URL), stop=stop, stream=stream)
    if stream:
        choices = [choice for chunk in found for choice in chunk.choices]
        assert "".join(choice.delta.content or "" for choice in choices) == text
        assert choices[-1].finish_reason == reason
    else:
        assert found.choices[0].message.content == text
        assert found.choices[0].finish_reason == reason


@pytest.mark.parametrize("stream", [False, True])
def test_tokens_are_told_with_their_probabilities(client: openai.OpenAI, stream: bool) -> None:
    found = ask(client, about(URL), logprobs=True, top_logprobs=2, stop=" is", stream=stream)
    choices = [choice for chunk in found for choice in chunk.choices] if stream else found.choices
    tokens = [token for choice in choices if choice.logprobs for token in choice.logprobs.content]
    assert [token.token for token in tokens] == ["No", " effusion", " is"]
    assert tokens[0].logprob == -0.1
    assert [each.token for each in tokens[0].top_logprobs] == ["No", "!"]
    assert tokens[1].bytes == list(b" effusion")


def test_several_answers_are_the_same(client: openai.OpenAI) -> None:
    first, second = ask(client, about(URL), n=2).choices
    assert (first.index, second.index) == (0, 1)
    assert first.message.content == second.message.content == "No effusion is seen"


def test_more_tokens_than_allowed_are_as_many_as_allowed(client: openai.OpenAI) -> None:
    assert ask(client, about(URL), max_tokens=5000).choices[0].finish_reason == "stop"


class Finding(BaseModel):
    """What a program would ask for."""

    effusion: bool
    words: str
    side: Literal["left", "right"] | None


def test_an_answer_is_parsed_into_a_schema(client: openai.OpenAI) -> None:
    found = client.chat.completions.parse(
        model="stand-in",
        messages=[about(URL)],  # type: ignore[list-item]
        response_format=Finding,
    )
    parsed = found.choices[0].message.parsed
    assert parsed == Finding(effusion=False, words="No effusion is seen", side=None)
    as_object = ask(client, about(URL), response_format={"type": "json_object"})
    assert json.loads(as_object.choices[0].message.content) == {"answer": "No effusion is seen"}


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_fits_no_schema_is_a_refusal(client: openai.OpenAI, stream: bool) -> None:
    numbers = schema_of({"type": "object", "properties": {"n": {"type": "integer"}}})
    found = ask(client, about(URL), response_format=numbers, stream=stream)
    if stream:
        deltas = [choice.delta for chunk in found for choice in chunk.choices]
        assert not any(delta.content for delta in deltas)
        refused = "".join(delta.refusal or "" for delta in deltas)
    else:
        assert found.choices[0].message.content is None
        refused = found.choices[0].message.refusal
    assert refused == "The answer does not fit the schema: No effusion is seen"


@pytest.mark.parametrize(
    ("schema", "choices"),
    [
        ({"enum": ["yes", "no"]}, ("yes", "no")),
        ({"properties": {"a": {"enum": ["left", "right"]}}}, ("left", "right")),
        ({"properties": {"a": {"$ref": "#/$defs/b"}}, "$defs": {"b": {"type": "boolean"}}}, YES_NO),
        ({"properties": {"a": {"enum": ["x", "y"]}, "b": {"type": "string"}}}, None),
        ({"enum": ["yes", None]}, None),
        ({"enum": ["only"]}, None),
        ({"enum": ["Yes", "yes"]}, None),
        ({"type": "string"}, None),
    ],
)
def test_the_values_of_a_schema_are_chosen_from(
    client: openai.OpenAI, engine: StandIn, schema: dict[str, Any], choices: Any
) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    ask(client, about(URL), response_format=form)
    assert engine.choices[-1] == choices
    ask(client, about(URL), response_format=form, logprobs=True)
    assert engine.choices[-1] is None


@pytest.mark.parametrize("stream", [False, True])
def test_an_unsure_answer_is_called_so(
    client: openai.OpenAI, engine: StandIn, stream: bool
) -> None:
    notice = Notice("not_a_scan", "It is a cat.")
    engine.changes = {"unsure": True, "warnings": (notice,)}
    found = ask(client, about(URL), stream=stream)
    if stream:
        pieces = [choice.delta.content for chunk in found for choice in chunk.choices]
        doubt = "Unsure: this is a best guess. It is a cat."
        assert "".join(filter(None, pieces)) == f"No effusion is seen\n\n{doubt}"
    else:
        whole = "It is a cat. Unsure. Best guess: No effusion is seen"
        assert found.choices[0].message.content == whole
        assert found.model_extra["medmoe"]["answer"] == "No effusion is seen"
        assert found.model_extra["medmoe"]["unsure"] is True


@pytest.mark.parametrize(
    ("text", "schema", "value"),
    [
        ("no", {"anyOf": [{"const": "yes"}, {"const": "no"}]}, "no"),
        ("Pneumonia.", {"enum": ["pneumonia", "normal"]}, "pneumonia"),
        ("The left lung", {"enum": ["left", "right"]}, "left"),
        ("There is no pneumonia.", {"enum": ["pneumonia", "normal"]}, Unfit),
        ("no evidence of effusion", {"enum": ["effusion", "no effusion"]}, Unfit),
        ("left and right", {"enum": ["left", "right"]}, Unfit),
        ("maybe", {"const": "yes"}, Unfit),
        ("Yes, it is.", {"type": ["boolean", "null"]}, True),
        ("Perhaps", {"type": ["boolean", "null"]}, None),
        ("Perhaps", {"type": "boolean"}, Unfit),
        ("words", {}, "words"),
        ("yes", {"properties": {"a": {"type": "boolean"}}}, {"a": True}),
        ("2.7 cm", {"type": "number"}, 2.7),
        ("2.7 cm", {"type": "integer"}, Unfit),
        ("level 007", {"type": "integer"}, 7),
        ("3 of 4", {"type": "integer"}, Unfit),
        ("left", {"type": "array", "items": {"enum": ["left", "right"]}}, ["left"]),
        ("x", {"properties": {"n": {"type": "integer"}}, "required": ["n"]}, Unfit),
    ],
)
def test_words_become_a_value_or_none_and_nothing_is_made_up(
    text: str, schema: dict[str, Any], value: Any
) -> None:
    if value is Unfit:
        with pytest.raises(Unfit):
            fitted(text, schema, schema)
    else:
        assert fitted(text, schema, schema) == value
        jsonschema.validate(value, schema)


@given(st.text("ab ", max_size=12), st.lists(st.text("ab ", min_size=1, max_size=4), max_size=3))
def test_stop_words_are_found_however_the_text_comes(text: str, stops: list[str]) -> None:
    found = [(at + len(stop), at) for stop in stops if (at := text.find(stop)) >= 0]
    for pieces in (text, [text]):
        until = Until(stops)
        told = "".join(map(until.take, pieces)) + until.rest()
        assert told == text[: min(found)[1] if found else len(text)]
        assert until.reached == bool(found)


def test_the_client_lists_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["stand-in", "stand-in-modality"]
    assert client.models.retrieve("stand-in").id == "stand-in"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4o")


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
        ([about(URL)], {"n": 99}, openai.UnprocessableEntityError, "invalid_request"),
        ([about(URL)], {"tools": [TOOL]}, openai.BadRequestError, "unsupported_parameter"),
        ([about(URL)], {"logit_bias": {"1": 9}}, openai.BadRequestError, "unsupported_parameter"),
        ([about(URL)], {"extra_body": {"X": 1}}, openai.BadRequestError, "unsupported_parameter"),
        (
            [about(URL)],
            {"response_format": schema_of({"$ref": "https://example.org/schema"})},
            *(openai.BadRequestError, "invalid_schema"),
        ),
        *(
            (
                [about(URL)],
                {"response_format": schema_of(schema)},
                *(openai.BadRequestError, "invalid_schema"),
            )
            for schema in (
                {"type": "no such type"},
                {"type": "string", "pattern": r"^(\w+\s?)*$"},  # would take for ever
                {"type": "string", "$dynamicRef": "http://169.254.169.254/x"},
                {"$ref": "#/nope"},
                {"type": "object", "properties": {name: {"$ref": "#"} for name in "abcdefgh"}},
                {"$ref": "#/$defs/a", "$defs": {"a": {"items": {"$ref": "#/$defs/a"}}}},
            )
        ),
        ([about(URL)], {"frequency_penalty": 1}, openai.BadRequestError, "unsupported_parameter"),
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


@pytest.mark.parametrize(
    "schema",
    [
        {"anyOf": [True] * 10_000},
        {"enum": [f"value {number}" for number in range(10_000)]},
        {"type": "string", "$defs": {f"d{number}": {} for number in range(10_000)}},
    ],
)
def test_a_schema_too_long_to_check_is_not_looked_at(
    schema: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[Any] = []
    monkeypatch.setattr(jsonschema.Draft202012Validator, "check_schema", looked.append)
    body = {"model": "stand-in", "messages": [about(URL)], "response_format": schema_of(schema)}
    with client_of(app_over(StandIn())) as client:
        error = client.post("/v1/chat/completions", json=body).json()["error"]
    assert error["code"] == "invalid_schema"
    assert "16,384 characters" in error["message"]
    assert looked == []


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/api/chat", "/api/show"])
def test_json_of_more_values_than_can_be_told_to_be_wrong_is_refused(path: str) -> None:
    values = ",".join("1" * 70_000)
    with client_of(app_over(StandIn())) as client:
        response = client.post(
            path,
            content=f'{{"model": "stand-in", "messages": [{values}]}}',
            headers={"Content-Type": "application/json"},
        )
    assert response.status_code == 413
    assert response.json()["error"]["code"] == "too_large"
