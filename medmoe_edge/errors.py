"""Everything that can go wrong, in one tree; and how results are told.

    MedMoEError                      exit code
    ├── InputError                   2   what the person gave cannot be used
    │   ├── ImageError               2   an image file
    │   └── DataError                2   a dataset, a question list, a recipe
    ├── ModelError                   3   a model cannot be used
    │   ├── ConfigError              3   a configuration
    │   ├── CheckpointError          3   a checkpoint folder
    │   └── BundleError              3   a deployable bundle
    ├── VerificationError            4   a fidelity gate failed
    └── ResourceError                5   memory, disk, device
        └── MissingDependencyError   5   an optional package

Every error says what was wrong and what to do about it; neither line may carry patient data. Its
`code` says the same to programs, more finely than the exit code. What is no error, but should be
known of a result that stands all the same, is a `Notice`. The results themselves
are told as plain JSON by `Told`, which stands here because it needs as little.
"""

import dataclasses
import difflib
import errno
import numbers
import os
import re
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar


@dataclasses.dataclass(frozen=True)
class Notice:
    """What a person and a program should know of a result that stands all the same.

    Attributes:
        code: A stable name for programs, such as `unlike_label`.
        message: The same for people, in one or two sentences; never patient data.
    """

    code: str
    message: str


class MedMoEError(Exception):
    """Base of all errors raised on purpose; `what` happened and what `remedy` to try."""

    exit_code: ClassVar[int] = 1
    code: ClassVar[str] = "failed"

    def __init__(self, what: str, remedy: str) -> None:
        super().__init__(f"{what} {remedy}")
        self.what = what
        self.remedy = remedy


class InputError(MedMoEError):
    """Something given by the caller cannot be used."""

    exit_code = 2
    code = "bad_input"


class ImageError(InputError):
    """An image file cannot be read or should not be read."""

    code = "bad_image"


class DataError(InputError):
    """A dataset, question list or training recipe is malformed."""

    code = "bad_data"


class ModelError(MedMoEError):
    """A model cannot be used."""

    exit_code = 3
    code = "bad_model"


class ConfigError(ModelError):
    """A configuration has unknown keys or impossible values."""

    code = "bad_config"


class CheckpointError(ModelError):
    """A checkpoint folder is incomplete, damaged or contradicts its configuration."""

    code = "bad_checkpoint"


class BundleError(ModelError):
    """A bundle is incomplete, damaged or of another format version."""

    code = "bad_bundle"


class VerificationError(MedMoEError):
    """A fidelity gate failed: the product was made, but must not be trusted.

    `found` is the verification with all its figures, where there is one.
    """

    exit_code = 4
    code = "verification_failed"
    found: Any = None


class ResourceError(MedMoEError):
    """Memory, disk or a device is missing."""

    exit_code = 5
    code = "no_resources"


class MissingDependencyError(ResourceError):
    """An optional package is not installed."""

    code = "missing_package"

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(
            f"This needs the package {package!r}, which is not installed.",
            f"Install it with: pip install 'medmoe-edge[{extra}]'",
        )


@contextmanager
def needs(extra: str) -> Iterator[None]:
    """Around imports of what only the packages of an extra can do.

    Raises `MissingDependencyError`, which names the package and the extra.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("medmoe_edge"):
            raise  # no package to install: a mistake of ours
        raise MissingDependencyError(error.name.partition(".")[0], extra) from error


def unreadable(what: str, error: OSError) -> tuple[str, str]:
    """Both lines of an error about a file or folder that could not be opened, the same everywhere.

    Args:
        what: How the sentence begins, such as "scan.png" or "The audit log".
        error: What the system said.
    """
    if isinstance(error, FileNotFoundError):
        return f"{what} does not exist.", "Check the path."
    reason = (error.strerror or "unknown reason").lower()
    return f"{what} cannot be opened: {reason}.", "Check the path and its permissions."


OF_MACHINE = {errno.EMFILE, errno.ENFILE, errno.EIO, errno.ESTALE}


def of_machine(what: str, error: BaseException | None) -> ResourceError | None:
    """The error to raise where the machine is at fault and not the file: another time it is read.

    Args:
        what: As for `unreadable`.
        error: Whatever was raised while the file was read.

    Returns:
        An error, or None where the file itself may be damaged or missing.
    """
    number = error.errno if isinstance(error, OSError) else None
    if number in (errno.ENOSPC, errno.EDQUOT):
        remedy = "Free some space, or write to another disk."
        return ResourceError(f"{what}: no space left on device.", remedy)
    if number not in OF_MACHINE:
        return None
    return ResourceError(
        f"{what} cannot be used now: {os.strerror(number).lower()}.",
        "The machine is at fault, not the file: close other programs, check its disk, try again.",
    )


E = typing.TypeVar("E", bound=MedMoEError)
_CLOSED = {errno.EACCES, errno.EPERM, errno.EINVAL, errno.EFBIG, errno.ELOOP}


def of_file(what: str, error: BaseException, other: E) -> ResourceError | E:
    """The error to raise for a model's file: the machine's fault, one like `other`, or `other`.

    What may not be opened is not damaged, as `other` says it is: it keeps that kind alone.
    """
    if isinstance(error, OSError) and error.errno in _CLOSED:
        return type(other)(*unreadable(what, error))
    return of_machine(what, error) or other


_WORDS: dict[Any, str] = {
    Path: "a path",
    str: "text",
    bool: "True or False",
    int: "a whole number",
    float: "a number",
    Sequence: "a list of texts",
    tuple: "a list of texts",
    Iterable: "a list",
    Mapping: "a mapping",
    types.NoneType: "None",
}


def checked(value: Any, hint: Any, name: str) -> Any:
    """A value as what `hint` says: text stands for a path too, and a list for a tuple of texts.

    Raises `InputError` for any other value, and for a path that is empty or that none can be;
    `name` is what callers call it.
    """
    if type(value).__module__ == "numpy" and getattr(value, "ndim", 1) == 0:
        value = value.item()
    union = typing.get_origin(hint) in (types.UnionType, typing.Union)
    kinds = typing.get_args(hint) if union else (hint,)
    for kind in kinds:
        if _fits(value, kind):
            return _CONVERTED.get(typing.get_origin(kind) or kind, lambda given: given)(value)
    choices = [each for kind in kinds if _is_literal(kind) for each in typing.get_args(kind)]
    if choices:
        known = ", ".join(map(str, choices))
        raise InputError(f"{name} is {value!r}.", f"Use one of: {known}.")
    shown = repr(value) if isinstance(value, str) and Path in kinds else type(value).__name__
    words = [_WORDS.get(k) or k.__name__ for k in (typing.get_origin(k) or k for k in kinds)]
    raise InputError(f"{name} cannot be {shown}.", f"Give {' or '.join(words)}.")


def check_all(**given: tuple[Any, Any]) -> None:
    """Raise `InputError` for the first of some values, by their names, that is not as its hint."""
    for name, (value, hint) in given.items():
        checked(value, hint, name)


_CONVERTED: dict[Any, Any] = {Path: Path, tuple: tuple, int: int, float: float}


def _is_literal(kind: Any) -> bool:
    return typing.get_origin(kind) is typing.Literal


def _fits(value: Any, kind: Any) -> bool:
    parts, kind = typing.get_args(kind), typing.get_origin(kind) or kind
    if kind is typing.Literal:
        return any(isinstance(value, type(part)) and value == part for part in parts)
    if kind is Path and isinstance(value, str | os.PathLike):
        text = os.fspath(value)
        return isinstance(text, str) and text != "" and "\0" not in text
    if kind in (int, float):
        number = numbers.Integral if kind is int else numbers.Real
        return isinstance(value, number) and not isinstance(value, bool)
    if kind in (tuple, Sequence):
        several = isinstance(value, Sequence) and not isinstance(value, str | bytes)
        return several and all(isinstance(part, parts[0]) for part in value)
    return isinstance(value, kind)


@dataclasses.dataclass(frozen=True)
class Options:
    """Base of what functions are asked for: checked when it is made, wherever that is.

    Raises `InputError` for a value that its field cannot have, as `checked` does.
    """

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):
            value = checked(getattr(self, field.name), hints[field.name], field.name)
            object.__setattr__(self, field.name, value)


def is_host(name: str) -> bool:
    """Whether it can be the name or address of a host: no part is empty, or over 63 letters."""
    try:
        return bool(name.encode("idna"))
    except UnicodeError:
        return False


def shown_bytes(count: float) -> str:
    """Bytes for people in the unit that fits, of powers of 1,000: 812 B, 21.3 MB, 3.12 GB."""
    for unit, digits in (("B", 0), ("kB", 1), ("MB", 1)):
        if round(abs(count), digits) < 1000:
            return f"{count:,.{digits}f} {unit}"
        count /= 1000
    return f"{count:,.2f} GB"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`Did you mean 'nano'? `, or nothing, to begin a remedy with.

    The nearest is what differs in case or marks alone; else what has all the words that were
    given; else what begins so; else what has nearly the same letters.
    """
    names = list(known)
    bare = {re.sub(r"[\W_]", "", each.lower()): each for each in reversed(names)}
    wanted = re.sub(r"[\W_]", "", name.lower())
    words = set(re.findall(r"[a-z]+|\d+", name.lower()))
    near = [bare[wanted]] if wanted in bare else []
    if not near and words:
        near = [each for each in names if words <= set(re.findall(r"[a-z]+|\d+", each.lower()))]
    if not near and len(wanted) > 2:
        near = [each for each in names if each.lower().startswith(name.lower())]
    if not near:
        near = difflib.get_close_matches(name.lower(), names, n=1)
    return f"Did you mean {near[0]!r}? " if near else ""


LATER = "later"  # of a field that is left out where it has its default


@dataclasses.dataclass(frozen=True)
class Told:
    """Base of what is told as JSON: its fields, then the properties that `TOLD` names."""

    TOLD: ClassVar[tuple[str, ...]] = ()

    def to_json(self) -> dict[str, Any]:
        """The same as plain JSON values (tuples become lists)."""
        names = [
            field.name
            for field in dataclasses.fields(self)
            if not field.metadata.get(LATER) or getattr(self, field.name) != field.default
        ]
        return {name: plain(getattr(self, name)) for name in (*names, *self.TOLD)}


def plain(value: Any) -> Any:
    """Records, and mappings and sequences of them, as plain JSON values."""
    if isinstance(value, Told):
        return value.to_json()
    if dataclasses.is_dataclass(value):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    elif hasattr(value, "_asdict"):  # of a NamedTuple
        value = value._asdict()
    if isinstance(value, Mapping):
        return {str(key): plain(part) for key, part in value.items()}
    if isinstance(value, tuple | list):
        return [plain(part) for part in value]
    return str(value) if isinstance(value, Path) else value
