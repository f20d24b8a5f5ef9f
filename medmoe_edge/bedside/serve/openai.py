"""OpenAI's chat completions, as far as one question about one image is a chat.

The shapes are those of https://platform.openai.com/docs/api-reference/chat. What would change the
answer and cannot be done is refused by name; what has no effect on a model that always takes the
most likely token, and what of a conversation does not reach it, is said in `medmoe.warnings`.
"""

import base64
import binascii
import json
import secrets
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field

from medmoe_edge.bedside.serve.errors import NAME, Refusal, refusal
from medmoe_edge.bedside.serve.forms import (
    ResponseFormat,
    Until,
    check_schema,
    choices_in,
    formed,
)
from medmoe_edge.bedside.serve.routes import (
    EVENTS,
    REFUSALS,
    AnswerBody,
    JsonRoute,
    event_stream,
    queued,
)
from medmoe_edge.bedside.serve.work import Work, Worker, started
from medmoe_edge.engine.answer import Answer, Piece
from medmoe_edge.engine.engine import MAX_NEW_TOKENS
from medmoe_edge.errors import ImageError, InputError, Notice


class Strict(BaseModel):
    """What has no other fields: nothing that a client sends is ignored without a word."""

    model_config = ConfigDict(extra="forbid")


class TextPart(Strict):
    """Words within a message."""

    type: Literal["text"]
    text: str


class ImageUrl(Strict):
    """An image as `data:image/png;base64,...`; nothing is fetched from elsewhere."""

    url: str
    detail: Literal["auto", "low", "high"] | None = None  # the model has one resolution


class ImagePart(Strict):
    """An image within a message."""

    type: Literal["image_url"]
    image_url: ImageUrl


class Message(BaseModel):
    """One turn of a chat."""

    model_config = ConfigDict(extra="allow")  # `of_the_conversation` tells what else there is

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Annotated[TextPart | ImagePart, Field(discriminator="type")]] | None = None

    @property
    def text(self) -> str:
        """Its words."""
        if isinstance(self.content, str):
            return self.content
        parts = [part.text for part in self.content or () if isinstance(part, TextPart)]
        return "\n".join(parts)

    @property
    def images(self) -> list[str]:
        """The URLs of its images."""
        return [image.url for image in self._images]

    @property
    def unused(self) -> list[str]:
        """The names of what it has beside its words and images."""
        names = {name for name, value in (self.model_extra or {}).items() if value}
        if any(image.detail in ("low", "high") for image in self._images):
            names.add("detail")
        return shown_names(names)

    @property
    def _images(self) -> list[ImageUrl]:
        parts = () if isinstance(self.content, str) else self.content or ()
        return [part.image_url for part in parts if isinstance(part, ImagePart)]


class StreamOptions(Strict):
    """Whether the last chunk tells how many tokens there were."""

    include_usage: bool = False
    include_obfuscation: bool = False  # nothing is ever added to chunks


WITHOUT_EFFECT = {"temperature", "top_p", "seed"}  # on what is always the most likely token
ABOUT_THE_CALLER = {
    *("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"),
    "prompt_cache_retention",
}
MOST_CHOICES = 8


class ChatRequest(BaseModel):
    """The last user's words are the question, the last image is what they are about."""

    model_config = ConfigDict(extra="allow")  # `check` looks at what else there is

    model: str
    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Annotated[int | None, Field(ge=1)] = None
    max_completion_tokens: Annotated[int | None, Field(ge=1)] = None
    n: Annotated[int | None, Field(ge=1, le=MOST_CHOICES)] = 1
    stop: str | Annotated[list[str], Field(max_length=4)] | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    logprobs: bool | None = False
    top_logprobs: Annotated[int | None, Field(ge=0, le=20)] = None
    response_format: ResponseFormat | None = None

    def check(self) -> None:
        """Raise `Refusal` for what would change the answer and cannot be done."""
        known = WITHOUT_EFFECT | ABOUT_THE_CALLER
        for name, value in (self.model_extra or {}).items():
            if name in known or not value or value in ("none", ["text"], "text"):
                continue
            shown = name if NAME.fullmatch(name) else None
            what = f"The parameter {shown} cannot be honoured." if shown else "A field is unknown."
            hint = "Leave it out; see /openapi.json for what can be asked."
            raise Refusal(400, "unsupported_parameter", what, hint, param=shown)
        form = self.response_format
        if form and form.type == "json_schema":
            if form.json_schema is None:
                what = "response_format is json_schema, and there is no schema."
                raise Refusal(400, "invalid_schema", what, "Send it.", param="response_format")
            check_schema(form.json_schema.definition)

    @property
    def question(self) -> str:
        """The last user's words."""
        asked = [message.text for message in self.messages if message.role == "user"]
        if not asked:
            raise InputError("There is no message of a user.", "Send one, with an image.")
        return asked[-1]

    @property
    def image(self) -> bytes:
        """The last image."""
        urls = [url for message in self.messages for url in message.images]
        if not urls:
            hint = "Send one as a part of type image_url, with a data URL."
            raise ImageError("There is no image in the messages.", hint)
        return from_data_url(urls[-1])

    @property
    def limit(self) -> int:
        """New tokens at most."""
        return self.max_completion_tokens or self.max_tokens or MAX_NEW_TOKENS

    @property
    def alternatives(self) -> int | None:
        """How many likely tokens are told at each place; None: not even the chosen one."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def choices(self) -> tuple[str, ...] | None:
        """The answers that its schema allows; with log-probabilities it is asked freely."""
        return None if self.logprobs else choices_in(self.response_format)

    @property
    def stops(self) -> tuple[str, ...]:
        """Where the answer is to end."""
        stops = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        return tuple(filter(None, stops))

    @property
    def notices(self) -> tuple[Notice, ...]:
        """What of the request did not reach the model."""
        extra = self.model_extra or {}
        given = sorted(name for name in WITHOUT_EFFECT if extra.get(name) is not None)
        what = ", as the model always takes the most likely token."
        without_effect = Notice(
            "parameters_without_effect", f"{', '.join(given)}: without effect{what}"
        )
        return (*of_the_conversation(self.messages), *([without_effect] if given else []))


def of_the_conversation(messages: Sequence[Message]) -> Iterator[Notice]:
    """What of a conversation does not reach the model, which has no memory."""
    if any(each.role in ("system", "developer") and each.text for each in messages):
        text = "The system's words did not reach the model, which has a prompt of its own."
        yield Notice("system_prompt_not_used", text)
    if sum(each.role in ("user", "assistant") and bool(each.text) for each in messages) > 1:
        text = "Earlier turns did not reach the model: it was asked the last question alone."
        yield Notice("history_not_used", text)
    if sum(len(each.images) for each in messages) > 1:
        text = "There are several images: the last one alone was looked at."
        yield Notice("images_not_used", text)
    if names := list(dict.fromkeys(name for each in messages for name in each.unused)):
        text = f"{', '.join(names)}: of the messages only words and images reach the model."
        yield Notice("message_fields_not_used", text)


def shown_names(names: set[str]) -> list[str]:
    """Names of fields in order; those that may be anything are "others", and last."""
    known = sorted(filter(NAME.fullmatch, names))
    return [*known, "others"] if len(known) < len(names) else known


def from_data_url(url: str) -> bytes:
    """The bytes in a data URL (RFC 2397); its media type is ignored, files tell their own."""
    head, comma, data = url.partition(",")
    if not head.startswith("data:") or not head.endswith(";base64") or not comma:
        hint = "Send the file itself: data:image/png;base64,..."
        raise ImageError("The image's URL is not a base64 data URL.", hint)
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as error:
        what = "The image's data URL is not valid base64."
        raise ImageError(what, "Encode the whole file, without line breaks.") from error


class Usage(BaseModel):
    """Tokens, image tokens among those of the prompt."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class LikelyToken(BaseModel):
    """A token that could have come, its log-probability and its UTF-8, None of half a character."""

    token: str
    logprob: float
    bytes: list[int] | None


class ChosenToken(LikelyToken):
    """A token of the answer, and the most likely ones at its place."""

    top_logprobs: list[LikelyToken]


class LogProbs(BaseModel):
    """The tokens of the answer, its end token left out."""

    content: list[ChosenToken]
    refusal: None


class ChoiceMessage(BaseModel):
    """What the model says; `refusal` is why it has no `content` of the form that was asked for."""

    role: Literal["assistant"]
    content: str | None
    refusal: str | None


class Choice(BaseModel):
    """One of `n` answers, which are all the same."""

    index: int
    message: ChoiceMessage
    logprobs: LogProbs | None
    finish_reason: Literal["stop", "length"]


class ChatCompletion(BaseModel):
    """OpenAI's `chat.completion`, and what `/v1/ask` tells of the answer."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[Choice]
    usage: Usage
    medmoe: AnswerBody


def openai_routes(work: Work, worker: Worker) -> APIRouter:
    """`/v1/models` and `/v1/chat/completions`."""
    router = APIRouter(prefix="/v1", responses=REFUSALS, route_class=JsonRoute)

    def loaded() -> list[dict[str, Any]]:
        models = [_model(work, work.engine, "med-moe")]
        if work.modality is not None:
            models.append(_model(work, work.modality, "medmoe"))
        return models

    @router.get("/models")
    async def models() -> dict[str, Any]:
        """What is loaded; only those of the kind `med-moe` answer questions."""
        return {"object": "list", "data": loaded()}

    @router.get("/models/{name}")
    async def model(name: str) -> dict[str, Any]:
        """One of them."""
        for found in loaded():
            if found["id"] == name:
                return found
        raise no_such_model(work)

    @router.post(
        "/chat/completions",
        responses={200: {"model": ChatCompletion, "content": EVENTS}},
        response_model=None,
    )
    async def chat(request: Request, chat: ChatRequest) -> Response:
        """Answer the last question about the last image, as OpenAI's API would.

        Beyond it, `medmoe` holds what `/v1/ask` tells of an answer.
        """
        if chat.model != work.engine.name:
            raise no_such_model(work)
        chat.check()
        limit = min(chat.limit, work.limits.new_tokens)
        completion = Completion(chat, work.engine.prompt_tokens(chat.question))
        ask = partial(
            work.ask,
            questions=[chat.question],
            max_new_tokens=limit,
            choices=chat.choices,
            alternatives=chat.alternatives,
        )
        job = await queued(work, worker, request, chat.image, ask)
        if chat.stream:
            return event_stream(completion.chunks(await started(job)))
        told = [item async for item in job]
        (answer,) = (item for item in told if isinstance(item, Answer))
        return JSONResponse(
            completion.whole(answer, [item for item in told if isinstance(item, Piece)])
        )

    return router


def no_such_model(work: Work) -> Refusal:
    """The refusal of a name that no loaded model has."""
    what, hint = "There is no such model.", f"Ask {work.engine.name}."
    return Refusal(404, "model_not_found", what, hint, param="model")


class Completion:
    """The answer to one request, in OpenAI's shapes."""

    def __init__(self, chat: ChatRequest, prompt_tokens: int) -> None:
        self._chat, self._prompt_tokens = chat, prompt_tokens
        self._tells_usage = bool(chat.stream_options and chat.stream_options.include_usage)
        self._head = {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": chat.model,
        }

    def whole(self, answer: Answer, pieces: Sequence[Piece] = ()) -> dict[str, Any]:
        """A `chat.completion`; with the log-probabilities of the pieces, if there are any."""
        until = Until(self._chat.stops)
        text = until.take(answer.text) + until.rest()
        content, refused = formed(text, self._chat.response_format)
        if self._in_words and answer.unsure:
            content = guessed(answer, text)
        message = {"role": "assistant", "content": content, "refusal": refused}
        reason = "stop" if until.reached or answer.complete else "length"
        told = self._before_stop(pieces) if self._chat.logprobs else None
        choice = {"message": message, "logprobs": told, "finish_reason": reason}
        return {
            **self._head,
            "object": "chat.completion",
            "choices": [{"index": index, **choice} for index in range(self._chat.n or 1)],
            "usage": self._usage(answer),
            "medmoe": self._told(answer),
        }

    async def chunks(self, items: AsyncIterator[str | Answer]) -> AsyncIterator[str]:
        """The events of a stream, each a `chat.completion.chunk`."""
        until = Until(self._chat.stops)
        form, in_words = self._chat.response_format, self._in_words
        try:
            yield self._chunk({"role": "assistant", "content": ""})
            async for item in items:
                if not isinstance(item, Answer):
                    likely = item if isinstance(item, Piece) and not until.reached else None
                    piece = until.take(item) if in_words else ""
                    if piece or likely is not None:
                        yield self._chunk({"content": piece}, likely=likely)
                    continue
                if in_words:
                    doubt = f"\n\n{guessed(item)}" if item.unsure else ""
                    rest: dict[str, Any] = {"content": until.rest() + doubt}
                else:
                    text = until.take(item.text) + until.rest()
                    content, refused = formed(text, form)
                    rest = {"content": content} if refused is None else {"refusal": refused}
                if any(rest.values()):
                    yield self._chunk(rest)
                reason = "stop" if until.reached or item.complete else "length"
                yield self._chunk({}, reason, medmoe=self._told(item))
                if self._tells_usage:
                    yield _data({**self._chunk_head(), "choices": [], "usage": self._usage(item)})
            yield "data: [DONE]\n\n"
        except Exception as error:  # the status has been sent
            yield _data(refusal(error).told())

    @property
    def _in_words(self) -> bool:
        form = self._chat.response_format
        return form is None or form.type == "text"

    def _told(self, answer: Answer) -> dict[str, Any]:
        return replace(answer, warnings=(*answer.warnings, *self._chat.notices)).to_json()

    def _usage(self, answer: Answer) -> dict[str, int]:
        asked, told = self._prompt_tokens, answer.timings.tokens
        counts = {"prompt_tokens": asked, "completion_tokens": told}
        return {**counts, "total_tokens": asked + told}

    def _chunk_head(self) -> dict[str, Any]:
        return {**self._head, "object": "chat.completion.chunk"}

    def _before_stop(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        """The log-probabilities of the tokens up to the one in which a stop word is whole."""
        until, told = Until(self._chat.stops), []
        for piece in pieces:
            if until.reached:
                break
            until.take(piece)
            told.append(piece)
        return _log_probs(told)

    def _chunk(
        self,
        delta: dict[str, Any],
        reason: str | None = None,
        *,
        likely: Piece | None = None,
        **more: Any,
    ) -> str:
        told = None if likely is None else _log_probs([likely])
        choice = {"delta": delta, "logprobs": told, "finish_reason": reason}
        choices = [{"index": index, **choice} for index in range(self._chat.n or 1)]
        return _data({**self._chunk_head(), "choices": choices, **more})


def guessed(answer: Answer, text: str | None = None) -> str:
    """An unsure answer for people: why it is that, and the best guess.

    Without its `text`, which was streamed already, that what was said is a guess.
    """
    why = " ".join(notice.message for notice in answer.reasons)
    if text is None:
        return f"Unsure: this is a best guess. {why}".strip()
    return f"{why} {replace(answer, text=text).shown}".strip()


def _log_probs(pieces: Sequence[Piece]) -> dict[str, Any]:
    content = [
        _token(*piece.chosen) | {"top_logprobs": [_token(*each) for each in piece.likely]}
        for piece in pieces
    ]
    return {"content": content, "refusal": None}


def _token(text: str, log_probability: float) -> dict[str, Any]:
    whole = "\N{REPLACEMENT CHARACTER}" not in text
    told = list(text.encode()) if whole else None
    return {"token": text, "logprob": log_probability, "bytes": told}


def _data(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value)}\n\n"


def _model(work: Work, model: Any, kind: str) -> dict[str, Any]:
    return {
        "id": model.name,
        "object": "model",
        "created": 0,
        "owned_by": "medmoe-edge",
        "kind": kind,
        "sha256": model.sha256,
        "verification": model.verification,
        "verified": model.proven.to_json() if model.proven else None,
        "audited": work.is_audited,
    }
