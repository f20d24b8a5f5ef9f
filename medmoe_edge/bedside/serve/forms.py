"""The form that an answer is asked for in: words as far as some that end it, or JSON."""

import json
import re
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

import jsonschema
from pydantic import BaseModel, ConfigDict, Field

from medmoe_edge.bedside.serve.errors import Refusal

MOST_DEPTH = 16  # of a schema


class JsonSchema(BaseModel):
    """A schema that the answer's content must fit."""

    model_config = ConfigDict(populate_by_name=True)

    name: str = ""
    description: str | None = None
    strict: bool | None = None
    definition: Annotated[dict[str, Any], Field(alias="schema")]


class ResponseFormat(BaseModel):
    """The form of the content: words, or JSON with the words in it."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class Until:
    """Text that comes in pieces, told as far as the first of some words that end it."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._kept = ""  # may be the beginning of one of them
        self.reached = False

    def take(self, piece: str) -> str:
        """What may be told, now that there is this piece too."""
        if self.reached:
            return ""
        text = self._kept + piece
        found = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:  # the one that is whole first, however the text was cut into pieces
            self.reached, self._kept = True, ""
            return text[: min(found)[1]]
        longest = max(map(len, self._stops), default=0)
        begun = [
            length
            for length in range(min(longest - 1, len(text)), 0, -1)
            if any(stop.startswith(text[-length:]) for stop in self._stops)
        ]
        keep = begun[0] if begun else 0
        self._kept = text[len(text) - keep :]
        return text[: len(text) - keep]

    def rest(self) -> str:
        """What was kept back, once nothing more comes."""
        rest, self._kept = self._kept, ""
        return rest


def formed(text: str, form: ResponseFormat | None) -> tuple[str | None, str | None]:
    """The content in the form that was asked for; or None, and why it has not that form.

    The model answers in words. In JSON these are the value of `answer`, or of the properties of a
    schema that they fit: text as it is, one of some values where the words name it, yes and no as
    true and false, a number where there is one.
    """
    if form is None or form.type == "text":
        return text, None
    if form.json_schema is None:
        return json.dumps({"answer": text}), None
    schema = form.json_schema.definition
    value = fitted(text, schema, schema)
    try:
        jsonschema.validate(value, schema)
    except (jsonschema.ValidationError, jsonschema.SchemaError, RecursionError):
        return None, f"The answer does not fit the schema: {text}"
    return json.dumps(value), None


def check_schema(schema: dict[str, Any]) -> None:
    """Raise `Refusal` for what is no JSON schema, or refers to others than its own parts."""
    try:
        jsonschema.Draft202012Validator.check_schema(schema)
        outside = any(not str(each).startswith("#") for each in _references(schema))
    except (jsonschema.SchemaError, RecursionError):
        outside = True
    if outside:
        what = "The schema of response_format cannot be used."
        hint = "Send a JSON schema that refers to its own parts alone."
        raise Refusal(400, "invalid_schema", what, hint, param="response_format")


def _references(part: Any) -> Iterator[Any]:
    if isinstance(part, dict):
        if "$ref" in part:
            yield part["$ref"]
        for value in part.values():
            yield from _references(value)
    elif isinstance(part, list):
        for value in part:
            yield from _references(value)


def fitted(text: str, schema: Any, root: dict[str, Any], depth: int = 0) -> Any:
    """Words as a value of a schema, as well as it can be done; `root` holds its definitions."""
    if not isinstance(schema, dict) or depth > MOST_DEPTH:
        return None
    if "$ref" in schema:
        return fitted(text, _definition(root, str(schema["$ref"])), root, depth + 1)
    if "const" in schema:
        return schema["const"]
    if "enum" in schema:
        named = [each for each in schema["enum"] if isinstance(each, str) and _names(text, each)]
        return max(named, key=len, default=None)
    for kind in ("anyOf", "oneOf"):
        for option in schema.get(kind, ()):
            value = fitted(text, option, root, depth + 1)
            if value is not None:
                return value
    match schema.get("type"):
        case "object":
            parts = schema.get("properties", {})
            return {name: fitted(text, part, root, depth + 1) for name, part in parts.items()}
        case "array":
            return [fitted(text, schema.get("items", {}), root, depth + 1)]
        case "string":
            return text
        case "boolean":
            word = (re.findall(r"[a-z]+", text.lower()) or [""])[0]
            return {"yes": True, "no": False}.get(word)
        case "integer" | "number" as kind:
            found = re.search(r"-?\d+(\.\d+)?", text)
            number = float(found[0]) if found else None
            return int(number) if number is not None and kind == "integer" else number
        case _:
            return None


def _definition(root: dict[str, Any], reference: str) -> Any:
    found: Any = root
    for part in reference.removeprefix("#").strip("/").split("/"):
        found = found.get(part, {}) if part and isinstance(found, dict) else found
    return found


def _names(text: str, value: str) -> bool:
    return re.search(rf"\b{re.escape(value)}\b", text, re.IGNORECASE) is not None
