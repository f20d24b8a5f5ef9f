"""OpenAI's chat completions, as far as one question about one image is a chat.

The shapes are those of https://platform.openai.com/docs/api-reference/chat; what they have beyond
ours is ignored, except what would change the answer's form.
"""

import base64
import binascii
import json
import secrets
import time
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, Field

from medmoe_edge.bedside.serve.errors import Refusal, refusal
from medmoe_edge.bedside.serve.guard import at_end
from medmoe_edge.bedside.serve.routes import EVENTS, REFUSALS, answers_of, client_of, event_stream
from medmoe_edge.bedside.serve.work import Work, Worker, started
from medmoe_edge.engine.answer import Answer
from medmoe_edge.engine.engine import MAX_NEW_TOKENS
from medmoe_edge.errors import ImageError, InputError


class TextPart(BaseModel):
    """Words within a message."""

    type: Literal["text"]
    text: str


class ImageUrl(BaseModel):
    """An image as `data:image/png;base64,...`; nothing is fetched from elsewhere."""

    url: str


class ImagePart(BaseModel):
    """An image within a message."""

    type: Literal["image_url"]
    image_url: ImageUrl


class Message(BaseModel):
    """One turn of a chat."""

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
        parts = () if isinstance(self.content, str) else self.content or ()
        return [part.image_url.url for part in parts if isinstance(part, ImagePart)]


class StreamOptions(BaseModel):
    """Whether the last chunk tells how many tokens there were."""

    include_usage: bool = False


class ChatRequest(BaseModel):
    """The last user's words are the question, the last image is what they are about.

    The model has no memory: earlier turns and the system's words do not reach it. It always takes
    the most likely token, so that `temperature` and its like change nothing.
    """

    model: str
    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Annotated[int | None, Field(ge=1)] = None
    max_completion_tokens: Annotated[int | None, Field(ge=1)] = None
    n: Literal[1] | None = 1
    stream: bool | None = False
    stream_options: StreamOptions | None = None

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


def openai_routes(work: Work, worker: Worker) -> APIRouter:
    """`/v1/models` and `/v1/chat/completions`."""
    router = APIRouter(prefix="/v1", responses=REFUSALS)

    @router.get("/models")
    async def models() -> dict[str, Any]:
        """What is loaded; only those of the kind `med-moe` answer questions."""
        loaded = [_model(work.engine, "med-moe")]
        if work.modality is not None:
            loaded.append(_model(work.modality, "medmoe"))
        return {"object": "list", "data": loaded}

    @router.post("/chat/completions", responses={200: {"content": EVENTS}}, response_model=None)
    async def chat(request: Request, chat: ChatRequest) -> Response:
        """Answer the last question about the last image, as OpenAI's API would.

        Beyond it, `medmoe` holds what `/v1/ask` tells of an answer.
        """
        if chat.model != work.engine.name:
            what, hint = "There is no such model.", f"Ask {work.engine.name}."
            raise Refusal(404, "model_not_found", what, hint)
        work.check_ask(1, chat.limit)
        question, limit = chat.question, chat.limit
        completion = Completion(chat, work.engine.prompt_tokens(question))
        ending = at_end(request)
        upload = await work.receive(chat.image, None, client_of(request), ending)
        job = worker.do(lambda: work.ask(upload, [question], limit), ending, upload.seconds)
        if chat.stream:
            return event_stream(completion.chunks(await started(job)))
        (answer,) = await answers_of(job)
        return JSONResponse(completion.whole(answer))

    return router


class Completion:
    """The answer to one request, in OpenAI's shapes."""

    def __init__(self, chat: ChatRequest, prompt_tokens: int) -> None:
        self._prompt_tokens = prompt_tokens
        self._tells_usage = bool(chat.stream_options and chat.stream_options.include_usage)
        self._head = {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": chat.model,
        }

    def whole(self, answer: Answer) -> dict[str, Any]:
        """A `chat.completion`."""
        message = {"role": "assistant", "content": answer.text, "refusal": None}
        choice = {"message": message, "logprobs": None, "finish_reason": _reason(answer)}
        return {
            **self._head,
            "object": "chat.completion",
            "choices": [{"index": 0, **choice}],
            "usage": self._usage(answer),
            "medmoe": answer.to_json(),
        }

    async def chunks(self, items: AsyncIterator[str | Answer]) -> AsyncIterator[str]:
        """The events of a stream, each a `chat.completion.chunk`."""
        try:
            yield self._chunk({"role": "assistant", "content": ""})
            async for item in items:
                if isinstance(item, Answer):
                    yield self._chunk({}, _reason(item), medmoe=item.to_json())
                    if self._tells_usage:
                        yield _data(
                            {**self._chunk_head(), "choices": [], "usage": self._usage(item)}
                        )
                elif item:
                    yield self._chunk({"content": item})
            yield "data: [DONE]\n\n"
        except Exception as error:  # the status has been sent
            yield _data(refusal(error).body().model_dump())

    def _usage(self, answer: Answer) -> dict[str, int]:
        asked, told = self._prompt_tokens, answer.timings.tokens
        counts = {"prompt_tokens": asked, "completion_tokens": told}
        return {**counts, "total_tokens": asked + told}

    def _chunk_head(self) -> dict[str, Any]:
        return {**self._head, "object": "chat.completion.chunk"}

    def _chunk(self, delta: dict[str, Any], reason: str | None = None, **more: Any) -> str:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        return _data({**self._chunk_head(), "choices": [choice], **more})


def _data(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value)}\n\n"


def _reason(answer: Answer) -> str:
    return "stop" if answer.complete else "length"


def _model(model: Any, kind: str) -> dict[str, Any]:
    return {
        "id": model.name,
        "object": "model",
        "created": 0,
        "owned_by": "medmoe-edge",
        "kind": kind,
        "sha256": model.sha256,
        "verification": model.verification,
        "verified": model.proven.to_json() if model.proven else None,
    }
