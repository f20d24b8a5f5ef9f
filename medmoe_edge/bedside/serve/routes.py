"""The service's own routes: an image and questions, labels or a phrase in, JSON or events out.

Pictures for browsers, which read neither DICOM nor NIfTI: as the model is shown them, and their
values, so that the page can lay another window over them.
"""

import asyncio
import base64
import contextlib
import dataclasses
import io
import json
from collections import Counter
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Callable,
    Collection,
    Coroutine,
    Generator,
)
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter, File, Form, Request, UploadFile
from fastapi.responses import JSONResponse, Response, StreamingResponse
from fastapi.routing import APIRoute
from PIL import Image as Pillow
from PIL.PngImagePlugin import PngInfo
from pydantic import BaseModel, ConfigDict, Field

from medmoe_edge.bedside.serve.errors import ErrorBody, Refusal, refusal
from medmoe_edge.bedside.serve.guard import at_end, client_of
from medmoe_edge.bedside.serve.settings import Limits
from medmoe_edge.bedside.serve.work import Job, T, Upload, Work, Worker, started
from medmoe_edge.contrastive.features import Location
from medmoe_edge.engine.answer import Answer, choices_of, given_choices
from medmoe_edge.engine.engine import MAX_NEW_TOKENS
from medmoe_edge.image.pixels import KINDS, Image, Window, finite, pick_frame
from medmoe_edge.image.worker import NAME, Bounds, GreyValues, held, read_for_display

LARGEST = 2048  # pixels of the longer side, more than a bedside screen has
MOST_COMMAS = 2**16  # of JSON, whose images have none: each value that does not fit takes 1 KB


class Codes(BaseModel):
    """Grey values `[height, width]` in the file's unit (HU for CT): `offset + scale * code`.

    `data` is base64 of the codes, 16 bits each, the low byte first. `inverted`: the lowest value is
    shown white.
    """

    data: str
    offset: float
    scale: float
    window: Window
    inverted: bool


class Warned(BaseModel):
    """A `medmoe_edge.errors.Notice`."""

    code: str
    message: str


class Picture(BaseModel):
    """One frame. `png` is base64 of what the model is shown, in the file's own window.

    `size` are the columns and rows of the file; picture and codes may have fewer, `width` and
    `height`. `codes` are None where there is colour. `warnings` are what should be known of the
    picture as it was read; answers about it repeat them. `sides` are the directions at the left,
    upper, right and lower edge, as of `medmoe_edge.image.pixels.Image`. `patient`, `series`,
    `position` and `instance` are as of `medmoe_edge.image.worker.Stated`: told on request alone.
    """

    size: tuple[int, int]
    width: int
    height: int
    frame: int
    frames: int
    modality: str | None
    png: str
    codes: Codes | None
    warnings: list[Warned]
    sides: tuple[str, str, str, str] | None
    patient: dict[str, str] | None = None
    series: str | None = None
    position: float | None = None
    instance: int | None = None


def picture_routes(limits: Limits) -> APIRouter:
    """`/v1/picture`."""
    router = APIRouter(prefix="/v1", responses=REFUSALS)

    @router.post(
        "/picture", responses={200: {"model": Picture, "content": EVENTS}}, response_model=None
    )
    async def picture(
        request: Request,
        form: Annotated[PictureForm, Form(media_type="multipart/form-data")],
    ) -> Response:
        """Decode an image for display; nothing of it is kept.

        With `stream`, all frames of it, as server-sent events: `picture` with that frame, then with
        its neighbours, outwards, and last `done`, or `error`.
        """
        await check_once(request)
        data = await form.image.read()
        await form.image.close()
        pictures = _pictures(data, form, limits.bounds)
        if form.stream:
            return event_stream(_told(await started(pictures)))
        async with contextlib.aclosing(pictures):
            return Response(await anext(pictures), media_type="application/json")

    return router


async def _pictures(data: bytes, form: "PictureForm", bounds: Bounds) -> AsyncGenerator[str]:
    """The frame that is asked for, then the others from there outwards, as JSON."""

    def read(frame: int | None) -> tuple[str, int, int]:
        found = picture_of(path, frame, bounds, patient=form.patient)
        return found.model_dump_json(), found.frame, found.frames

    with held(data) as path:
        # not on the models' thread: one can look while another's question is answered
        first, at, count = await asyncio.to_thread(read, form.frame)
        yield first
        for frame in sorted(range(count), key=lambda other: abs(other - at))[1:]:
            yield (await asyncio.to_thread(read, frame))[0]


async def _told(pictures: AsyncIterator[str]) -> AsyncIterator[str]:
    try:
        async for picture in pictures:
            yield f"event: picture\ndata: {picture}\n\n"
        yield _event("done", {})
    except Exception as error:  # the status has been sent
        yield _event("error", refusal(error).told())


def picture_of(
    source: bytes | Path, frame: int | None, bounds: Bounds, *, patient: bool = False
) -> Picture:
    """The picture in an uploaded file; the errors of `medmoe_edge.image.worker.read_apart`.

    With `patient`, also what the file says of the patient and the series.
    """
    found = read_for_display(source, frame, bounds)
    image, values = found.image, found.values
    height, width = image.pixels.shape[:2]
    index = pick_frame(NAME, frame, image.frames)
    red, green, blue = (image.pixels[..., channel] for channel in range(3))
    grey = np.array_equal(red, green) and np.array_equal(green, blue)
    shown = _reduced(Pillow.fromarray(image.pixels[..., 0] if grey else image.pixels))
    return Picture(
        size=(width, height),
        width=shown.width,
        height=shown.height,
        frame=index,
        frames=image.frames,
        modality=image.modality,
        png=_png(shown),
        codes=_codes(image, values, shown) if grey else None,
        warnings=[Warned(code=each.code, message=each.message) for each in image.notices],
        sides=image.sides,
        **(dataclasses.asdict(found.stated) if patient else {}),
    )


def _codes(image: Image, found: GreyValues | None, shown: Pillow.Image) -> Codes:
    centre, width = image.window or (127.5, 255.0)
    if found is None:  # of other files only what their window shows
        values, inverted = centre - width / 2 + np.asarray(shown) * (width / 255), False
    else:
        inverted = found.inverted
        # in the proportions of the picture, which the stored values may lack
        values = finite(np.asarray(_resized(Pillow.fromarray(found.values), shown.size)))
    low, high = float(values.min()), float(values.max())
    if found is not None and image.window is None:
        centre, width = (low + high) / 2, high - low
    whole = high - low < 2**16 and bool((values == np.rint(values)).all())
    scale = 1.0 if whole else (high - low) / (2**16 - 1) or 1.0
    codes = np.rint(np.clip((values - low) / scale, 0, 2**16 - 1)).astype("<u2")
    encoded = base64.b64encode(codes.tobytes()).decode()
    window = centre, width if width > 0 else 1.0
    return Codes(data=encoded, offset=low, scale=scale, window=window, inverted=inverted)


def _reduced(picture: Pillow.Image) -> Pillow.Image:
    scale = LARGEST / max(picture.size)
    if scale >= 1:
        return picture
    width, height = (max(1, round(side * scale)) for side in picture.size)
    return _resized(picture, (width, height))


def _resized(picture: Pillow.Image, size: tuple[int, int]) -> Pillow.Image:
    return picture if picture.size == size else picture.resize(size, Pillow.Resampling.BOX)


def _png(picture: Pillow.Image) -> str:
    file = io.BytesIO()
    picture.save(file, "PNG", compress_level=1)  # it goes to the next room, and at once
    return base64.b64encode(file.getvalue()).decode()


class AnswerBody(BaseModel):
    """A `medmoe_edge.engine.answer.Answer`, whose documentation says what each is."""

    question: str
    answer: str
    confidence: float
    confidence_kind: Literal["calibrated", "raw"]
    modality: str | None
    experts: dict[str, float]
    timings: dict[str, float | bool]
    model: dict[str, Any]
    complete: bool
    notice: str
    paging: dict[str, Any] | None
    warnings: list[Warned]
    unsure: bool
    stopped: Literal["length", "repetition"] | None
    refusals: dict[str, float]
    probabilities: dict[str, float] | None


class Answers(BaseModel):
    """One for each question, in their order."""

    answers: list[AnswerBody]


REFUSALS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody}
    for status in (400, 401, 403, 404, 408, 413, 415, 421, 422, 429, 500, 503, 504)
}
EVENT = {
    "type": "object",
    "properties": {"event": {"type": "string"}, "data": {"type": "string"}},
    "required": ["data"],
}
EVENTS = {"text/event-stream": {"schema": EVENT}}
PICTURE = {"image/png": {"schema": {"type": "string", "format": "binary"}}}
Text = Annotated[str, Field(min_length=1, max_length=10_000)]


class ImageForm(BaseModel):
    """An uploaded image; its name is ignored."""

    model_config = ConfigDict(extra="forbid")

    image: Annotated[UploadFile, File(description=f"As a file: {KINDS}.")]
    frame: Annotated[int | None, Field(ge=0, description="From 0; else the middle one.")] = None


class PictureForm(ImageForm):
    """What is to be told of an image that is shown."""

    patient: Annotated[bool, Field(description="Tell whose it is, for those who may know.")] = False
    stream: Annotated[bool, Field(description="Tell all frames as they come, as events.")] = False


class AskForm(ImageForm):
    """Questions about an image."""

    question: Annotated[list[Text], Field(min_length=1)]
    max_new_tokens: Annotated[int, Field(ge=1)] = MAX_NEW_TOKENS
    choices: Annotated[
        list[Text] | None, Field(description="The answers that may be given, to every question.")
    ] = None
    yes_no: Annotated[
        bool, Field(description="Answer questions that ask for yes or no with one of these.")
    ] = False
    stream: Annotated[bool, Field(description="Tell the answers as they come, as events.")] = False


class ClassifyForm(ImageForm):
    """Labels to choose from."""

    label: Annotated[list[Text], Field(min_length=1, max_length=100)]


class LocateForm(ImageForm):
    """What to look for, and how to show where it is."""

    phrase: Text
    format: Literal["json", "png"] = "json"


LISTED = ("question", "choices", "label")


async def check_once(request: Request, listed: Collection[str] = ()) -> None:
    """Raise `Refusal` for a field that is there twice, of which the last alone would count."""
    counts = Counter(name for name, _ in (await request.form()).multi_items())
    for name in counts.keys() - set(listed):
        if counts[name] > 1:
            what = f"{name} is there {counts[name]} times."
            raise Refusal(422, "invalid_request", what, "Send it once.")


class JsonRoute(APIRoute):
    """A route whose body is JSON, of which no more is read than can be told to be wrong."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """FastAPI's own, and this check before it."""
        handle = super().get_route_handler()

        async def checked(request: Request) -> Response:
            if request.method == "POST" and (await request.body()).count(b",") > MOST_COMMAS:
                what = "The JSON has too many values."
                raise Refusal(413, "too_large", what, "Send the last messages alone.")
            return await handle(request)

        return checked


def own_routes(work: Work, worker: Worker) -> APIRouter:
    """`/v1/ask`, `/v1/seen`, `/v1/classify` and `/v1/locate`."""
    router = APIRouter(prefix="/v1", responses=REFUSALS)

    async def job_of(
        request: Request, form: ImageForm, do: Callable[[Upload], Generator[T, None, None]]
    ) -> Job[T]:
        await check_once(request, LISTED)
        data = await form.image.read()
        await form.image.close()  # gives its copy back
        return await queued(work, worker, request, data, do, form.frame)

    @router.post(
        "/ask", responses={200: {"model": Answers, "content": EVENTS}}, response_model=None
    )
    async def ask(
        request: Request, form: Annotated[AskForm, Form(media_type="multipart/form-data")]
    ) -> Response:
        """Answer questions about an image: `{"answers": [...]}` in their order.

        With `stream`, as server-sent events: `token` with the `index` of its question and a piece
        of `text`, `answer` with what else would be under `answers`, and last `done`, or `error`.
        """
        work.check_ask(len(form.question), form.max_new_tokens)
        choices = choices_of(form.choices, "") or given_choices(form.question, form.yes_no)
        job = await job_of(
            request,
            form,
            partial(
                work.ask,
                questions=form.question,
                max_new_tokens=form.max_new_tokens,
                choices=choices,
            ),
        )
        if form.stream:
            return event_stream(_events(await started(job)))
        return JSONResponse({"answers": [answer.to_json() for answer in await answers_of(job)]})

    @router.post("/seen", responses={200: {"content": PICTURE}}, response_model=None)
    async def seen(
        request: Request, form: Annotated[ImageForm, Form(media_type="multipart/form-data")]
    ) -> Response:
        """Exactly what the model sees of an image when it is asked, as PNG at its resolution."""
        job = await job_of(request, form, work.seen)
        return Response(await anext(job), media_type="image/png")

    @router.post("/classify", response_model=None)
    async def classify(
        request: Request, form: Annotated[ClassifyForm, Form(media_type="multipart/form-data")]
    ) -> Response:
        """Choose among labels: calibrated probabilities, given that one of them is right."""
        work.check_modality()
        job = await job_of(request, form, partial(work.classify, labels=form.label))
        return JSONResponse((await anext(job)).to_json())

    @router.post("/locate", responses={200: {"content": PICTURE}}, response_model=None)
    async def locate(
        request: Request, form: Annotated[LocateForm, Form(media_type="multipart/form-data")]
    ) -> Response:
        """Find a phrase in an image.

        The map is a grey PNG as large as the picture, black for -1 and white for 1; in JSON it is
        under `heat_png`, base64.
        """
        work.check_modality()
        found = await anext(await job_of(request, form, partial(work.locate, phrase=form.phrase)))
        png = heat_png(found)
        if form.format == "png":
            return Response(png, media_type="image/png")
        return JSONResponse(found.to_json() | {"heat_png": base64.b64encode(png).decode()})

    return router


async def answers_of(job: Job[str | Answer]) -> list[Answer]:
    """The answers alone."""
    return [item async for item in job if isinstance(item, Answer)]


def event_stream(events: AsyncIterator[str]) -> StreamingResponse:
    """A response of server-sent events."""
    return StreamingResponse(events, media_type="text/event-stream")


def heat_png(found: Location) -> bytes:
    """A heat map -1..1 `[H, W]` as a grey picture 0..255; the notice is in it as text."""
    grey = np.rint((np.clip(found.heat, -1, 1) + 1) * 127.5).astype(np.uint8)
    about, file = PngInfo(), io.BytesIO()
    about.add_text("Comment", found.notice)
    Pillow.fromarray(grey).save(file, "PNG", pnginfo=about)
    return file.getvalue()


async def queued(
    work: Work,
    worker: Worker,
    request: Request,
    data: bytes,
    do: Callable[[Upload], Generator[T, None, None]],
    frame: int | None = None,
) -> Job[T]:
    """Queue what is to be done with an uploaded image; at the request's end it is cancelled."""
    ending = at_end(request)
    upload = await work.receive(data, frame, client_of(request), ending)
    return worker.do(lambda: do(upload), ending, upload.who, upload.seconds)


async def _events(items: AsyncIterator[str | Answer]) -> AsyncIterator[str]:
    index = 0
    try:
        async for item in items:
            if isinstance(item, Answer):
                yield _event("answer", {"index": index, **item.to_json()})
                index += 1
            elif item:
                yield _event("token", {"index": index, "text": item})
        yield _event("done", {})
    except Exception as error:  # the status has been sent
        yield _event("error", refusal(error).told())


def _event(name: str, data: dict[str, Any]) -> str:
    return f"event: {name}\ndata: {json.dumps(data)}\n\n"
