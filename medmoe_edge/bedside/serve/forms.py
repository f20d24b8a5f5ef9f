"""The form that an answer is asked for in: words as far as some that end it, or JSON."""

import json
import re
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

import jsonschema
from pydantic import BaseModel, ConfigDict, Field

from medmoe_edge.bedside.serve.errors import Refusal
from medmoe_edge.engine.answer import YES_NO, choices_of
from medmoe_edge.errors import InputError

MOST_PARTS = 256  # of a schema, its references followed
LONGEST = 2**14  # characters of a schema, which takes a second to check
# What words can be held to. Of the others some would need what the model cannot give, and some
# (patterns, references elsewhere) could be used against the service.
KEYWORDS = {
    *("type", "properties", "required", "additionalProperties", "items", "enum", "const"),
    *("anyOf", "oneOf", "$ref", "$defs", "definitions"),
    *("title", "description", "default", "examples", "$schema", "$id", "$comment"),
}
NEGATIONS = re.compile(
    r"\b(no|not|none|never|neither|nor|without|absent|negative|free)\b|n't\b", re.I
)


class JsonSchema(BaseModel):
    """A schema that the answer's content must fit."""

    model_config = ConfigDict(populate_by_name=True, extra="forbid")

    name: str = ""
    description: str | None = None
    strict: bool | None = None
    definition: Annotated[dict[str, Any], Field(alias="schema")]


class ResponseFormat(BaseModel):
    """The form of the content: words, or JSON with the words in it."""

    model_config = ConfigDict(extra="forbid")

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


class Unfit(Exception):
    """Words that are no value of a schema."""


def formed(text: str, form: ResponseFormat | None) -> tuple[str | None, str | None]:
    """The content in the form that was asked for; or None, and why it has not that form.

    The model answers in words. In JSON these are the value of `answer`, or of the properties of a
    schema that they fit: text as it is, the one of some values that the words name, yes and no as
    true and false, a number where there is one. Nothing is made up: what does not fit is null where
    a schema allows that, and no value at all where it does not.
    """
    if form is None or form.type == "text":
        return text, None
    if form.json_schema is None:
        return json.dumps({"answer": text}), None
    schema = form.json_schema.definition
    try:
        value = fitted(text, schema, schema)
        if not _says_something(value):
            raise Unfit
    except Unfit:
        return None, f"The answer does not fit the schema: {text}"
    return json.dumps(value), None


def choices_in(form: ResponseFormat | None) -> tuple[str, ...] | None:
    """The answers that a checked schema allows, where it holds one value of an enum or a boolean.

    None where it allows others, more than one value, or what the engine cannot choose from.
    """
    if form is None or form.json_schema is None:
        return None
    root = schema = form.json_schema.definition
    while "$ref" in schema or schema.get("properties"):
        if "$ref" in schema:
            schema = _definition(root, str(schema["$ref"]))
        elif len(schema["properties"]) == 1:
            (schema,) = schema["properties"].values()
        else:
            return None
    values = YES_NO if schema.get("type") == "boolean" else schema.get("enum", ())
    try:
        return choices_of([each if isinstance(each, str) else "" for each in values], "")
    except InputError:
        return None


def check_schema(schema: dict[str, Any]) -> None:
    """Raise `Refusal` for what is no JSON schema, or has more than words can be held to."""
    try:
        if len(json.dumps(schema, ensure_ascii=False)) > LONGEST:
            raise Unfit(f"it has more than {LONGEST:,} characters")
        jsonschema.Draft202012Validator.check_schema(schema)
        if sum(1 for _ in _parts(schema, schema, ())) == 0:
            raise Unfit
    except (jsonschema.SchemaError, RecursionError, Unfit) as error:
        named = f" ({error})" if isinstance(error, Unfit) and str(error) else ""
        what = f"The schema of response_format cannot be used{named}."
        hint = "Use type, properties, required, enum, const, anyOf, items and $ref to $defs."
        raise Refusal(400, "invalid_schema", what, hint, param="response_format") from error


def _parts(schema: Any, root: dict[str, Any], above: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """Every part of a schema that words are fitted to; raises `Unfit` for what cannot be used."""
    waiting: list[tuple[Any, tuple[str, ...]]] = [(schema, above)]
    count = 0
    while waiting:
        part, trail = waiting.pop()
        count += 1
        if not isinstance(part, dict) or count > MOST_PARTS:
            raise Unfit(
                "it has too many parts" if count > MOST_PARTS else "true and false are none"
            )
        if unknown := sorted(set(part) - KEYWORDS):
            name = unknown[0] if re.fullmatch(r"\$?[A-Za-z]{1,40}", unknown[0]) else "a keyword"
            raise Unfit(f"{name} is not honoured")
        if "$ref" in part:
            reference = str(part["$ref"])
            if reference in trail:
                raise Unfit("it refers to itself")
            waiting.append((_definition(root, reference), (*trail, reference)))
        inner = [*part.get("properties", {}).values(), *part.get("anyOf", ())]
        inner += [*part.get("oneOf", ()), *([part["items"]] if "items" in part else [])]
        waiting += [(each, trail) for each in inner]
        yield part


def _definition(root: dict[str, Any], reference: str) -> Any:
    """What a reference within the schema (RFC 6901) leads to; raises `Unfit`."""
    if not reference.startswith("#/"):
        raise Unfit("it refers to something else than its own $defs")
    found: Any = root
    for part in reference[2:].split("/"):
        key = part.replace("~1", "/").replace("~0", "~")
        if not isinstance(found, dict) or key not in found:
            raise Unfit("it refers to what is not there")
        found = found[key]
    return found


def fitted(text: str, schema: dict[str, Any], root: dict[str, Any]) -> Any:
    """Words as a value of a schema that was checked; `root` holds its definitions.

    Raises `Unfit` where they are none.
    """
    if "$ref" in schema:
        return fitted(text, _definition(root, str(schema["$ref"])), root)
    if "const" in schema or "enum" in schema:
        return _one_of(text, schema["enum"] if "enum" in schema else [schema["const"]])
    options = [*schema.get("anyOf", ()), *schema.get("oneOf", ())]
    if not options:
        kinds = schema.get("type", "object" if "properties" in schema else "string")
        options = [
            {**schema, "type": kind} for kind in ([kinds] if isinstance(kinds, str) else kinds)
        ]
        if len(options) == 1:
            return _of_type(text, options[0], root)
    for option in sorted(options, key=lambda option: option.get("type") == "null"):
        try:
            return fitted(text, option, root)
        except Unfit:
            continue
    raise Unfit


def _of_type(text: str, schema: dict[str, Any], root: dict[str, Any]) -> Any:
    match schema["type"]:
        case "object":
            return _object(text, schema, root)
        case "array":
            return [fitted(text, schema.get("items", {"type": "string"}), root)]
        case "string":
            return text
        case "null":
            return None
        case "boolean":
            return _one_of(text, [True, False])
        case "integer" | "number" as kind:
            found = re.findall(r"-?\d+(?:\.\d+)?", text)
            if len(found) == 1 and (kind == "number" or "." not in found[0]):
                return int(found[0]) if kind == "integer" else float(found[0])
    raise Unfit


def _object(text: str, schema: dict[str, Any], root: dict[str, Any]) -> dict[str, Any]:
    found = {}
    for name, part in schema.get("properties", {}).items():
        try:
            found[name] = fitted(text, part, root)
        except Unfit:
            if name in schema.get("required", ()):
                raise
    if missing := set(schema.get("required", ())) - set(found):
        raise Unfit(str(missing))
    return found


def _one_of(text: str, values: Sequence[Any]) -> Any:
    """The value that the words are, or else the only one that they name and do not deny."""
    plain = _plain(text)
    for value in values:
        if isinstance(value, bool):
            first = (re.findall(r"[a-z]+", plain) or [""])[0]
            if first == ("yes" if value else "no"):
                return value
        elif isinstance(value, str) and _plain(value) == plain:
            return value
    words = [value for value in values if isinstance(value, str)]
    named = [value for value in words if re.search(rf"\b{re.escape(_plain(value))}\b", plain)]
    if len(named) == 1 and not NEGATIONS.search(text):
        return named[0]
    raise Unfit


def _plain(text: str) -> str:
    return " ".join(re.findall(r"[\w'-]+", text.casefold()))


def _says_something(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_says_something, value.values()))
    return value is not None
