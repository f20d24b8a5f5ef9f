"""What a batch is about, images or their series, and questions; and what is done of it.

A folder gives all its files, also those in folders within and behind links, in the order of their
paths; hidden ones are left out. A file to which several paths lead is there once: by its own path,
or where it lies elsewhere, by the first. A CSV file gives its rows in their order: the column
`image` holds paths, relative to the CSV's folder, and the column `question`, where there is one,
what is asked of that row's image.
Nothing is opened here, unless DICOM files are to be asked by series: then their headers are read,
and a series is asked once, about slices that are chosen as the node chooses them
(`listen.selection`). A file that is no image is found out when it is asked about.

What is done lies in SQLite beside the output, so that an interrupted batch can go on. An image's
results are one row, written in one transaction: there or not, and never twice; with the hashes of
its files, so that one that was changed meanwhile is asked about again. After a kill nothing
is lost; after a power cut at most the last images, which are then asked about again. It holds what
the output holds, and goes when that is whole.
"""

import contextlib
import csv
import hashlib
import io
import json
import os
import sqlite3
import stat
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from medmoe_edge.atomic import file_sha256
from medmoe_edge.data.datasets import read_text
from medmoe_edge.errors import DataError, InputError, MedMoEError, Notice, ResourceError
from medmoe_edge.image.pixels import HEAD_BYTES, is_dicom
from medmoe_edge.prompt import check_question

if TYPE_CHECKING:
    from medmoe_edge.bedside.listen.config import Series

COLUMNS = "Let its first line be: image, or image,question"


class Item(NamedTuple):
    """An image, as it is named in the results and as it is opened, and what is asked of it.

    Of a series it is the first of the `slices` to ask, which have a name and a path each; `of` is
    how many the series has, and `notices` say what was left out.
    """

    image: str
    path: str
    questions: tuple[str, ...]
    slices: tuple[tuple[str, str], ...] = ()
    of: int = 1
    notices: tuple[Notice, ...] = ()


class Inputs(NamedTuple):
    """Images, and for each further path in their folder to one of them the name it is asked by."""

    items: list[Item]
    links: dict[str, str]


def read_items(inputs: Path, questions: Path | None, *, besides: Collection[Path] = ()) -> Inputs:
    """The images of a folder (but the files `besides`) or of a CSV file, with their questions.

    Where a CSV file has questions of its own there must be no `questions`, else there must.
    Raises `DataError` that names file and line, and `InputError` for what cannot be put together.
    """
    links = dict[str, str]()
    if inputs.is_dir():
        asked = _shared(questions, "images of a folder")
        left_out = {path.resolve() for path in (*besides, *([questions] if questions else []))}
        files, links = _files(inputs, left_out)
        items = [Item(name, path, asked) for name, path in files]
    else:
        items = _from_csv(inputs, questions)
    if not items:
        raise InputError(f"{inputs} names no images.", "Give a folder of images, or a CSV file.")
    return Inputs(items, links)


def read_questions(file: Path) -> tuple[str, ...]:
    """The questions in a text file, one on a line; empty lines are left out.

    Raises `DataError` that names the line of an unusable one.
    """
    lines = enumerate(read_text(file).split("\n"), start=1)
    found = tuple(_checked(line, file, number) for number, line in lines if line.strip())
    if not found:
        raise DataError(f"{file} holds no questions.", "Write one on each line.")
    return found


def fingerprint(items: Sequence[Item], *more: object) -> str:
    """SHA-256 of a job, by which an interrupted one is known again."""
    digest = hashlib.sha256(json.dumps(more).encode())
    for item in items:
        chosen = [[name for name, _ in item.slices]] if item.slices else []
        digest.update(json.dumps([item.image, item.questions, *chosen]).encode())
    return digest.hexdigest()


def hashes_of(item: Item) -> dict[str, str]:
    """SHA-256 of an image's file, or of those of a series' slices, by name; empty of no image."""
    return {name: _sha256(path) for name, path in item.slices or ((item.image, item.path),)}


def _sha256(path: str) -> str:
    try:  # reading a pipe or a device might never end
        return file_sha256(Path(path)) if stat.S_ISREG(os.stat(path).st_mode) else ""
    except (OSError, ValueError):  # there is none, or cannot be
        return ""


Header = Mapping[str, Any]  # what `header_of` tells; JSON values


def header_of(path: str) -> Header:
    """Where a DICOM file belongs, without its pixels, as JSON values; empty of any other file.

    Why nothing is asked of it (`aside`, a key of `listen.selection.ASIDE`), hashes of its own UID,
    its study and patient, its place in its series, and what it marks as a key object.
    """
    from medmoe_edge.bedside.listen.header import check_uids, origin_of
    from medmoe_edge.bedside.listen.selection import aside, key_objects, membership_of
    from medmoe_edge.image.dicom_container import open_container
    from medmoe_edge.image.loading import decoding

    try:
        with decoding(Path(path).name):
            if not _is_dicom(path):
                return {}
            with open_container(Path(path)) as container:
                dataset, has_pixels = container.header.dataset, container.pixels is not None
            check_uids(dataset)
            origin, membership = origin_of(dataset, b""), membership_of(dataset)
            return {
                "aside": aside(dataset, has_pixels, None),
                **{name: getattr(origin, name) for name in ("uid", "study", "patient", "person")},
                **membership._asdict(),
                "marks": key_objects(dataset),
            }
    except MedMoEError:
        return {}  # who asks about it says what is wrong


def _is_dicom(path: str) -> bool:
    """By its first bytes; raises `OSError`."""
    with open(path, "rb") as file:
        return is_dicom(file.read(HEAD_BYTES))


class Grouped(NamedTuple):
    """Series and single images in the order of their first files, and what is not asked, by why."""

    items: list[Item]
    left_out: dict[str, int]


def group_series(items: Sequence[Item], headers: Sequence[Header], series: "Series") -> Grouped:
    """Bring the images of a series together, and choose which of them are asked.

    `headers` are those of the items. What is no DICOM file stands alone. An object that is there
    twice in a series, with the same content, counts once; what is for processing is left out where
    it is there for presentation. Raises `InputError` for items that are not all asked the same.
    """
    from medmoe_edge.bedside.listen.schema import Slice
    from medmoe_edge.bedside.listen.selection import chosen, of_one_person

    if any(item.questions != items[0].questions for item in items):
        raise InputError(
            "The images of a series must all be asked the same.",
            "Leave the column `question` out, and give --questions.",
        )
    left_out, marks = Counter[str](), {uid for header in headers for uid in header.get("marks", ())}
    slices: dict[str, list[Slice]] = defaultdict(list)
    shown: dict[tuple[str, str], list[str]] = defaultdict(list)  # the patients, by study and view
    marked, persons = set[str](), defaultdict[str, set[str]](set)
    seen: dict[tuple[str, str], list[str]] = defaultdict(list)  # a series is of one patient
    issued: dict[str, set[str]] = defaultdict(set)
    for header in filter(None, headers):
        issued[header["any_issuer"]] |= {header["series"]} - {header["any_issuer"]}
    for number, header in enumerate(headers):
        key = str(number)
        # without the issuer of the patient's number, it may be of the one series that has one
        others = issued[header["series"]] if header else set()
        series_of = next(iter(others)) if len(others) == 1 else header.get("series", "")
        if not header:
            slices[key] = []
        elif header["aside"]:
            left_out[header["aside"]] += 1
        elif _is_among(items[number].path, known := seen[header["uid"], series_of]):
            left_out["twice"] += 1
        else:
            known.append(items[number].path)
            if header["uid"] in marks:
                marked.add(key)
            place = (header[name] for name in ("position", "instance", "intent", "view"))
            slices[series_of].append(Slice(key, "", "", (), *place))
            persons[series_of].add(header["person"])
            if header["intent"] == "presentation":
                shown[header["study"], header["view"]].append(header["patient"])
    found = []
    for name, members in slices.items():
        kept = [
            each
            for each in members
            if each.intent != "processing" or not _is_shown_too(headers[int(each.key)], shown)
        ]
        left_out["for_processing"] += len(members) - len(kept)
        if not members:
            found.append(items[int(name)])
        elif kept:
            selection = chosen(kept, marked, series)
            asked = [items[int(each.key)] for each in selection.slices]
            named = tuple((item.image, item.path) for item in asked)
            notices = (*selection.notices, *of_one_person(persons[name]))
            found.append(asked[0]._replace(slices=named, of=selection.of, notices=notices))
    return Grouped(found, dict(+left_out))


def _is_among(path: str, known: Collection[str]) -> bool:
    """Whether one of the files with its UID has its content too, in whatever encoding."""
    content = _content(path) if known else None
    return content is not None and any(_content(each) == content for each in known)


def _content(path: str) -> str | None:
    """SHA-256 of all elements of a DICOM file; None where it cannot be read."""
    from medmoe_edge.bedside.listen.header import origin_of
    from medmoe_edge.image.dicom_container import read_whole
    from medmoe_edge.image.loading import decoding

    try:
        with decoding(Path(path).name):
            return origin_of(read_whole(Path(path), Path(path).name), b"").content
    except MedMoEError:
        return None  # who asks about it says what is wrong


def _is_shown_too(header: Header, shown: Mapping[tuple[str, str], Sequence[str]]) -> bool:
    """Whether its patient's study has its view for presentation."""
    from medmoe_edge.bedside.listen.header import same_patient

    patients = shown.get((header["study"], header["view"]), ())
    return any(same_patient(patient, header["patient"]) for patient in patients)


def _shared(questions: Path | None, of_what: str) -> tuple[str, ...]:
    if questions is None:
        raise InputError(
            f"There are no questions for the {of_what}.",
            "Write them into a file, one on each line: --questions FILE",
        )
    return read_questions(questions)


def _files(
    folder: Path, left_out: Collection[Path]
) -> tuple[list[tuple[str, str]], dict[str, str]]:
    """Of each file its path below the folder, with `/`, and its whole path; and the further paths
    that lead to the same files, with the first.
    """

    def refuse(error: OSError) -> None:  # its images would be missing, and nobody would know
        raise InputError(
            f"{folder} or a folder within cannot be read: {(error.strerror or 'unknown').lower()}.",
            "Check its permissions, or name the images in a CSV file.",
        ) from error

    root = folder.resolve()
    found, walked = [], {root}
    for parent, folders, names in os.walk(root, onerror=refuse, followlinks=True):
        shown = [Path(parent, name) for name in folders if not name.startswith(".")]
        shown.sort(key=lambda path: (path.is_symlink(), path))  # a folder goes before its links
        folders[:] = [path.name for path in shown if _is_new(path, root, walked)]
        found += [Path(parent, name) for name in names if not name.startswith(".")]
    by_target: dict[str, list[str]] = defaultdict(list)
    for path in sorted(found, key=lambda path: (path.is_symlink(), path)):
        by_target[os.path.realpath(path)].append(path.relative_to(root).as_posix())
    kept = [names for target, names in by_target.items() if Path(target) not in left_out]
    named = sorted((root / names[0], names[0]) for names in kept)
    links = {link: names[0] for names in kept for link in names[1:]}
    return [(name, str(path)) for path, name in named], links


def _is_new(folder: Path, root: Path, walked: set[Path]) -> bool:
    """Whether its files are found by no other way; it then counts as walked.

    Those of a link to a folder within the root are, and one to what the root lies in has no end.
    """
    target = folder.resolve()
    leads_back = root.is_relative_to(target) or _is_shown(target, root)
    if target in walked or (folder.is_symlink() and leads_back):
        return False
    walked.add(target)
    return True


def _is_shown(folder: Path, root: Path) -> bool:
    """Whether it lies within the root, and in no hidden folder there."""
    if not folder.is_relative_to(root):
        return False
    return not any(part.startswith(".") for part in folder.relative_to(root).parts)


def _from_csv(file: Path, questions: Path | None) -> list[Item]:
    rows = csv.DictReader(io.StringIO(read_text(file), newline=""), strict=True)
    try:
        rows.fieldnames = columns = [name.strip() for name in rows.fieldnames or ()]
        if "image" not in columns:
            raise DataError(f"{file} has no column named image.", COLUMNS)
        if any(columns.count(name) > 1 for name in ("image", "question")):
            raise DataError(f"{file} has two columns of one name.", COLUMNS)
        has_questions = "question" in columns
        if has_questions and questions is not None:
            raise InputError(
                f"{file} has questions of its own, and --questions gives others.",
                "Leave --questions out, or the column.",
            )
        asked = () if has_questions else _shared(questions, f"images of {file}")
        return [_item(row, file, rows.line_num, asked) for row in rows]
    except csv.Error as error:
        raise DataError(f"{file}, line {rows.line_num}: this is no CSV.", COLUMNS) from error


def _item(row: dict[str | Any, Any], file: Path, line: int, asked: tuple[str, ...]) -> Item:
    if any(row.get(None) or ()):  # else a question would end before its first comma
        raise DataError(
            f"{file}, line {line}: there are more cells than columns.",
            "Put what has a comma in it between quotes.",
        )
    image = row["image"]
    if not image:
        raise DataError(f"{file}, line {line}: there is no image.", "Fill it in.")
    questions = asked or (_checked(row["question"] or "", file, line),)
    return Item(image, str(file.parent.resolve() / image), questions)


def _checked(question: str, file: Path, line: int) -> str:
    try:
        return check_question(question)
    except InputError as error:
        raise DataError(f"{file}, line {line}: {error.what}", error.remedy) from error


Row = dict[str, Any]


class Asked(NamedTuple):
    """The results of an image or a series, and its files' hashes before they were read."""

    hashes: dict[str, str]
    rows: list[Row]


BUSY = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}
DAMAGED = {sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_ERROR}

SCHEMA = (
    "CREATE TABLE IF NOT EXISTS job (fingerprint TEXT NOT NULL) STRICT",
    "CREATE TABLE IF NOT EXISTS asked "
    "(number INTEGER PRIMARY KEY, hashes TEXT NOT NULL, rows TEXT NOT NULL) STRICT",
)


def journal_path(output: Path) -> Path:
    """Where the journal of an output lies: hidden, so that no folder of images shows it."""
    return output.with_name(f".{output.name}.journal")


class Journal:
    """The journal of one job, for this process alone while it is open; a context manager.

    Raises `InputError` for one of another job (unless `force`, which begins anew), for one that
    another command holds and for a damaged one; `ResourceError` where the disk does not take it.
    """

    def __init__(self, output: Path, fingerprint: str, *, force: bool = False) -> None:
        self.path, self._output = journal_path(output), output
        try:
            self._open(fingerprint, force)
        except _Damaged:
            if not force:
                raise
            self._delete()
            self._open(fingerprint, force)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._database.close()

    def done(self) -> dict[int, dict[str, str]]:
        """The numbers of the images whose results are kept, and their files' hashes then."""
        with self._explaining():
            rows = self._database.execute("SELECT number, hashes FROM asked")
            return {number: json.loads(hashes) for number, hashes in rows}

    def forget(self, numbers: Iterable[int]) -> None:
        """Forget the results of images, which are to be asked about again."""
        with self._explaining():
            rows = [(number,) for number in numbers]
            self._database.executemany("DELETE FROM asked WHERE number = ?", rows)

    def keep(self, number: int, asked: Asked) -> None:
        """Keep the results of an image; what comes a second time is left out."""
        values = number, json.dumps(asked.hashes), json.dumps(asked.rows)
        with self._explaining():
            self._database.execute("INSERT OR IGNORE INTO asked VALUES (?, ?, ?)", values)

    def results(self) -> Iterator[tuple[int, list[Row]]]:
        """The results of all images, in their order."""
        with self._explaining():
            rows = self._database.execute("SELECT number, rows FROM asked ORDER BY number")
            for number, text in rows:
                yield number, json.loads(text)

    def remove(self) -> None:
        """The output is whole: close the journal and delete it."""
        self._database.close()
        self._delete()

    def _open(self, fingerprint: str, force: bool) -> None:
        with contextlib.ExitStack() as stack, self._explaining():
            self._database = sqlite3.connect(self.path, timeout=1, isolation_level=None)
            stack.callback(self._database.close)
            self._database.execute("PRAGMA locking_mode = EXCLUSIVE")
            self._database.execute("PRAGMA journal_mode = WAL")
            self._database.execute("PRAGMA synchronous = NORMAL")
            self._database.execute("BEGIN IMMEDIATE")
            for statement in SCHEMA:
                self._database.execute(statement)
            self._begin(fingerprint, force)
            self._database.execute("COMMIT")
            stack.pop_all()

    def _begin(self, fingerprint: str, force: bool) -> None:
        found = self._database.execute("SELECT fingerprint FROM job").fetchone()
        if found == (fingerprint,):
            return
        if found is not None and not force:
            raise InputError(
                f"An unfinished run to {self._output} had other images, questions or options, "
                "or another model.",
                "Give it the same again to finish it, or begin anew with --force.",
            )
        self._database.execute("DELETE FROM asked")
        self._database.execute("DELETE FROM job")
        self._database.execute("INSERT INTO job VALUES (?)", (fingerprint,))

    def _delete(self) -> None:
        for ending in ("", "-wal", "-shm"):
            self.path.with_name(self.path.name + ending).unlink(missing_ok=True)

    @contextlib.contextmanager
    def _explaining(self) -> Iterator[None]:
        """Around SQLite: its errors as ours."""
        try:
            yield
        except sqlite3.Error as error:
            code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # the kind, without its details
            if code in BUSY:
                raise InputError(
                    f"Another command is at work on {self._output}.", "Let it end first."
                ) from error
            if code in DAMAGED:
                raise _Damaged(
                    f"What was kept of an unfinished run to {self._output} is damaged.",
                    "Begin anew with --force.",
                ) from error
            raise ResourceError(
                f"What is done cannot be kept beside {self._output} ({type(error).__name__}).",
                "Free some space, check the folder's permissions, or write elsewhere.",
            ) from error


class _Damaged(InputError):
    """A journal that contradicts itself."""
