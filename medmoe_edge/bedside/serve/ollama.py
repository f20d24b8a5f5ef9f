"""Ollama's chat, so that programs written for it (Open WebUI and others) can ask.

The shapes are those of https://github.com/ollama/ollama/blob/main/docs/api.md. As with OpenAI's,
the last user's words are the question and the last image is what they are about; what else there is
does not reach the model, and `medmoe.warnings` say so.
"""

import base64
import binascii
import datetime
import json
from collections.abc import AsyncIterator
from functools import partial
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field

from medmoe_edge._version import __version__
from medmoe_edge.bedside.serve.errors import Refusal, refusal
from medmoe_edge.bedside.serve.forms import Until
from medmoe_edge.bedside.serve.openai import (
    ChatRequest,
    Completion,
    guessed,
    no_such_model,
    shown_names,
)
from medmoe_edge.bedside.serve.routes import REFUSALS, JsonRoute, answers_of, queued
from medmoe_edge.bedside.serve.work import Work, Worker, started
from medmoe_edge.engine.answer import Answer

FOREVER = "9999-12-31T23:59:59Z"
NANO = 10**9  # Ollama's times are in nanoseconds
LINES = {"application/x-ndjson": {"schema": {"type": "string"}}}
HONOURED = {"num_predict", "stop"}
WITHOUT_EFFECT = {"keep_alive", "think"}  # the model stays loaded, and does not think aloud
CHANCE = {
    *("temperature", "top_k", "top_p", "min_p", "typical_p", "tfs_z", "seed"),
    *("mirostat", "mirostat_eta", "mirostat_tau"),
}
REFUSED = {"logprobs", "top_logprobs", "n"}  # of OpenAI's, which have no place in Ollama's shapes


class OllamaMessage(BaseModel):
    """One turn of a chat; images are base64."""

    model_config = ConfigDict(extra="allow")

    role: Literal["system", "user", "assistant", "tool"]
    content: str = ""
    images: list[str] | None = None


class OllamaName(BaseModel):
    """Which model; older programs call it `name`."""

    model: str = ""
    name: str = ""


class OllamaChat(BaseModel):
    """A chat; `options` has Ollama's, of which `num_predict` and `stop` have an effect."""

    model_config = ConfigDict(extra="allow")

    model: str
    messages: Annotated[list[OllamaMessage], Field(min_length=1)]
    stream: bool = True
    format: Literal["json", ""] | dict[str, Any] | None = None
    options: dict[str, Any] | None = None

    def as_chat(self) -> ChatRequest:
        """The same as OpenAI has it; raises `Refusal` for what cannot be done."""
        options = self.options or {}
        extra = {name: value for name, value in (self.model_extra or {}).items() if value}
        extra = {name: extra[name] for name in extra if name not in WITHOUT_EFFECT}
        if refused := sorted(REFUSED & set(extra)):
            what = f"The parameter {refused[0]} cannot be honoured."
            raise Refusal(400, "unsupported_parameter", what, "Leave it out.", param=refused[0])
        form: Any = None
        if self.format == "json":
            form = {"type": "json_object"}
        elif isinstance(self.format, dict):
            form = {"type": "json_schema", "json_schema": {"schema": self.format}}
        try:
            return ChatRequest.model_validate(
                {
                    **extra,
                    "model": self.model.removesuffix(":latest"),
                    "messages": [_turn(message) for message in self.messages],
                    "max_tokens": _limit(options.get("num_predict")),
                    "stop": options.get("stop"),
                    "response_format": form,
                }
            )
        except (ValueError, TypeError) as error:
            what = "The chat or its options cannot be read."
            raise Refusal(400, "invalid_request", what, "See /openapi.json.") from error

    @property
    def notices(self) -> list[dict[str, str]]:
        """What has not been applied."""
        asked = {**(self.options or {}), "think": (self.model_extra or {}).get("think") or None}
        given = {name for name, value in asked.items() if value is not None} - HONOURED
        reasons = (
            (given & CHANCE, ", as the model always takes the most likely token"),
            (given & {"think"}, ", as the model does not think aloud"),
            (given - CHANCE - {"think"}, ""),
        )
        return [
            {
                "code": "options_not_applied",
                "message": f"{', '.join(shown_names(names))}: not applied{why}.",
            }
            for names, why in reasons
            if names
        ]


def _turn(message: OllamaMessage) -> dict[str, Any]:
    content: list[dict[str, Any]] = [{"type": "text", "text": message.content}]
    for image in message.images or ():
        try:
            base64.b64decode(image, validate=True)
        except (binascii.Error, ValueError) as error:
            what, hint = "An image is not valid base64.", "Encode the whole file, without a prefix."
            raise Refusal(400, "bad_image", what, hint) from error
        url = f"data:image;base64,{image}"
        content.append({"type": "image_url", "image_url": {"url": url}})
    return {**(message.model_extra or {}), "role": message.role, "content": content}


def _limit(most: Any) -> int | None:
    """New tokens at most, of Ollama's `num_predict`: -1 and -2 are as many as are allowed."""
    if most is None or most in (-1, -2):
        return None
    if isinstance(most, bool) or not isinstance(most, int) or most < 1:
        raise ValueError("no number of tokens")
    return most


def ollama_routes(work: Work, worker: Worker) -> APIRouter:
    """`/api/chat`, `/api/tags`, `/api/ps`, `/api/show` and `/api/version`."""
    router = APIRouter(prefix="/api", responses=REFUSALS, route_class=JsonRoute)

    @router.get("/version")
    async def version() -> dict[str, str]:
        """The version of this service."""
        return {"version": __version__}

    @router.get("/tags")
    async def tags() -> dict[str, Any]:
        """The model that answers questions."""
        return {"models": [_tag(work)]}

    @router.get("/ps")
    async def loaded() -> dict[str, Any]:
        """The same, as it stays loaded."""
        return {"models": [{**_tag(work), "expires_at": FOREVER, "size_vram": 0}]}

    @router.post("/show")
    async def show(asked: OllamaName) -> dict[str, Any]:
        """What can be asked of the model."""
        name = asked.model or asked.name
        if name.removesuffix(":latest") != work.engine.name:
            raise no_such_model(work)
        return {**_tag(work), "capabilities": ["completion", "vision"], "model_info": {}}

    @router.post("/chat", responses={200: {"content": LINES}}, response_model=None)
    async def chat(request: Request, asked: OllamaChat) -> Response:
        """Answer the last question about the last image, as Ollama would."""
        chat = asked.as_chat()
        if chat.model != work.engine.name:
            raise no_such_model(work)
        chat.check()
        limit = min(chat.limit, work.limits.new_tokens)
        told = _Lines(asked, chat, work.engine.prompt_tokens(chat.question))
        ask = partial(
            work.ask, questions=[chat.question], max_new_tokens=limit, choices=chat.choices
        )
        job = await queued(work, worker, request, chat.image, ask)
        if asked.stream:
            lines = told.lines(await started(job))
            return StreamingResponse(lines, media_type="application/x-ndjson")
        (answer,) = await answers_of(job)
        return JSONResponse(told.whole(answer))

    return router


class _Lines:
    """The answer to one request, in Ollama's shapes."""

    def __init__(self, asked: OllamaChat, chat: ChatRequest, prompt_tokens: int) -> None:
        self._asked, self._chat = asked, chat
        self._completion, self._prompt_tokens = Completion(chat, prompt_tokens), prompt_tokens

    def whole(self, answer: Answer) -> dict[str, Any]:
        """All at once, and the figures."""
        found = self._completion.whole(answer)
        choice = found["choices"][0]
        content, refused = choice["message"]["content"], choice["message"]["refusal"]
        content = refused if content is None else content
        found["medmoe"]["warnings"] += self._asked.notices
        times = answer.timings
        return {
            **self._line(content, done=True),
            "done_reason": choice["finish_reason"],
            "total_duration": round(times.total * NANO),
            "load_duration": 0,
            "prompt_eval_count": self._prompt_tokens,
            "prompt_eval_duration": round(times.first_token * NANO),
            "eval_count": times.tokens,
            "eval_duration": round(times.decode * NANO),
            "medmoe": found["medmoe"],
        }

    async def lines(self, items: AsyncIterator[str | Answer]) -> AsyncIterator[str]:
        """A line of JSON for each piece; the last has the figures."""
        until, in_words = Until(self._chat.stops), self._chat.response_format is None
        told = ""
        try:
            async for item in items:
                if isinstance(item, Answer):
                    last = self.whole(item)
                    if told and item.unsure:
                        rest = until.rest()
                        last["message"]["content"] = f"{rest}\n\n{guessed(item)}"
                    else:
                        last["message"]["content"] = last["message"]["content"].removeprefix(told)
                    yield json.dumps(last) + "\n"
                elif in_words and (piece := until.take(item)):
                    told += piece
                    yield json.dumps(self._line(piece, done=False)) + "\n"
        except Exception as error:  # the status has been sent
            yield json.dumps({"error": refusal(error).detail}) + "\n"

    def _line(self, content: str, *, done: bool) -> dict[str, Any]:
        return {
            "model": self._asked.model,
            "created_at": datetime.datetime.now(datetime.UTC).isoformat(),
            "message": {"role": "assistant", "content": content},
            "done": done,
        }


def _tag(work: Work) -> dict[str, Any]:
    name = work.engine.name
    return {
        "name": f"{name}:latest",
        "model": f"{name}:latest",
        "modified_at": "1970-01-01T00:00:00Z",
        "size": 0,
        "digest": work.engine.sha256,
        "details": {
            "parent_model": "",
            "format": "onnx",
            "family": "med-moe",
            "families": ["med-moe"],
            "parameter_size": "",
            "quantization_level": "",
        },
    }
