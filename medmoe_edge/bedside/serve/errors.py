"""How the service fails: one JSON shape for every error, readable by OpenAI's clients too."""

import re
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from medmoe_edge.errors import (
    ImageError,
    InputError,
    MedMoEError,
    MissingDependencyError,
    ResourceError,
)

TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}
NAME = re.compile(r"[a-z][a-z0-9_]{0,40}")  # of a parameter, that may be told as it is
UNEXPECTED = "Something unexpected went wrong."


class ErrorDetail(BaseModel):
    """What was wrong, what to do about it, and for programs a code and the field at fault."""

    message: str
    remedy: str
    type: str
    code: str
    param: str | None = None


class ErrorBody(BaseModel):
    """The body of every answer that is none."""

    error: ErrorDetail


class Refusal(HTTPException):
    """A request that is not answered; `code` is a stable name for the reason."""

    def __init__(
        self,
        status: int,
        code: str,
        what: str,
        remedy: str,
        headers: Mapping[str, str] | None = None,
        *,
        param: str | None = None,
    ) -> None:
        super().__init__(status, what, headers)
        self.code, self.remedy, self.param = code, remedy, param

    def told(self) -> dict[str, Any]:
        """The JSON body."""
        kind = "server_error" if self.status_code >= 500 else "invalid_request_error"
        kind = TYPES.get(self.status_code, kind)
        detail = ErrorDetail(
            message=self.detail, remedy=self.remedy, type=kind, code=self.code, param=self.param
        )
        return ErrorBody(error=detail).model_dump(exclude_none=True)

    def response(self) -> JSONResponse:
        """The response to send."""
        return JSONResponse(self.told(), self.status_code, self.headers)


def too_long(what: str = "The answer took too long.") -> Refusal:
    """The refusal of a request whose answer would come too late."""
    return Refusal(504, "timeout", what, "Ask less at once, or try again later.")


def refusal(error: Exception) -> Refusal:
    """Any error as a refusal; of one that nobody expected nothing is told."""
    match error:
        case Refusal():
            return error
        case HTTPException(status_code=status):
            reason = HTTPStatus(status).phrase
            what = "The form cannot be read." if status == 400 else f"{reason}."
            code = reason.lower().replace(" ", "_")
            return Refusal(status, code, what, "See /openapi.json.", error.headers)
        case RequestValidationError():
            return Refusal(422, "invalid_request", _complaints(error), "See /openapi.json.")
        case MissingDependencyError():
            return Refusal(415, "unsupported_image", error.what, error.remedy)
        case ImageError():
            return Refusal(400, "bad_image", error.what, error.remedy)
        case InputError():
            return Refusal(400, "bad_input", error.what, error.remedy)
        case ResourceError():
            return Refusal(503, "no_resources", error.what, error.remedy)
        case MedMoEError():
            return Refusal(500, "model_failed", error.what, error.remedy)
        case MemoryError():
            return Refusal(503, "no_resources", "There is not enough memory.", "Send less at once.")
        case _:
            return Refusal(500, "unexpected", UNEXPECTED, "Look into the service's log.")


def add_error_handlers(app: FastAPI) -> None:
    """Make all expected errors of an app's routes refusals; the others are left to its guard."""

    async def respond(_: Request, error: Exception) -> JSONResponse:
        return refusal(error).response()

    for kind in (HTTPException, RequestValidationError, MedMoEError, MemoryError):
        app.add_exception_handler(kind, respond)


def _complaints(error: RequestValidationError) -> str:
    """What pydantic found wrong where, without the values, which may be about a patient."""
    told = []
    for found in error.errors()[:3]:
        *place, last = found["loc"][1:] or ("body",)
        what = found["msg"]
        if found["type"] == "extra_forbidden":  # a name that the client made up
            last = last if NAME.fullmatch(str(last)) else "a field"
            what = "There is no such field"
        told.append(f"{'.'.join(map(str, [*place, last]))}: {what}.")
    return " ".join(told)
