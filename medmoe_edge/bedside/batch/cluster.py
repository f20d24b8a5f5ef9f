"""A batch on a cluster: Ray Data deals the images out to processes, each with an engine of its own.

The images go out in small parts and their results come back to the process that called, which alone
writes the journal: a worker that dies loses at most its part, which Ray gives to another as often
as it takes, and what would arrive twice is kept once. The paths must lead to the same images on
every machine, and all of them must have the same medmoe-edge: who is in the cluster is trusted.
"""

import contextlib
import dataclasses
import json
import logging
import os
import socket
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Self
from urllib.parse import urlsplit

import pyarrow
import ray
import ray.data
import ray.exceptions

from medmoe_edge.bedside.batch.inputs import Asked, Header, Item, header_of
from medmoe_edge.bedside.batch.run import Identity, Numbered, Recipe, answer, check
from medmoe_edge.bundle.trust import TRUSTED_KEYS
from medmoe_edge.errors import InputError, MedMoEError, ModelError, Notice, ResourceError

PART = 16  # images or series that a worker takes at once, and may lose
HEADERS = 1024  # files whose headers are read at once
LOCAL = "local"  # a cluster of this machine's own, which ends with the batch
ATTEMPTS = 2  # to start it: Ray gives up after 30 s, in which a slow machine reads its programs
REACHING = 5.0  # seconds
OBJECTS = 256 * 2**20  # bytes of shared memory for that one: paths and answers, no pixels
KINDS = {kind.exit_code: kind for kind in (InputError, ModelError, ResourceError)}


class OnRay:
    """Answers on a Ray cluster; a context manager, which leaves the cluster at its end.

    `address` is that of a running one (`10.1.2.3:6379`), or "local"; `workers` is the number of
    engines, by default one for each machine, since an engine uses all cores of its own. With the
    device "cuda" each takes a GPU. Raises `ResourceError` where there is no such cluster, or one
    that is too small.
    """

    def __init__(self, address: str, recipe: Recipe, workers: int | None = None) -> None:
        self._address, self._recipe, self._workers = address, recipe.elsewhere(), workers
        self._needs = {"num_cpus": 1, "num_gpus": int(recipe.device == "cuda")}

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            stack.enter_context(contextlib.redirect_stdout(sys.stderr))  # Ray tells what it does
            stack.callback(ray.shutdown)
            self._join()
            self._stack = stack.pop_all()
        return self

    def _join(self) -> None:
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # else it reports its use to its makers
        mine: dict[str, Any] = _environment()
        _check_reachable(self._address)
        if self._address == LOCAL:
            mine |= {"num_cpus": self._workers or 1, "object_store_memory": OBJECTS}
            mine["include_dashboard"] = False
        for attempt in range(ATTEMPTS if self._address == LOCAL else 1):
            if attempt:
                ray.shutdown()
            try:
                ray.init(self._address, logging_level=logging.ERROR, log_to_driver=False, **mine)
                break
            except Exception as error:  # Ray's own have no kind, such as of a start that is slow
                failed = error
        else:
            raise _no_cluster(failed, self._address) from failed
        cluster: Any = ray  # these two of its functions have no types
        self._workers = self._workers or sum(node["Alive"] for node in cluster.nodes())
        self._check_size(cluster.cluster_resources())

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def begin(self, questions: Iterable[str]) -> Identity:
        """Have one machine load the model; see `run.Answering`."""
        identify = ray.remote(_identify).options(**self._needs)
        with _explaining():
            told = ray.get(identify.remote(self._recipe, tuple(questions)))
        return Identity(*_unless_failed(told))

    def headers(self, paths: Sequence[str]) -> Iterator[tuple[int, Header]]:
        """What each file's header tells, as they come; every CPU of the cluster reads."""
        _quieten()
        parts = ray.data.from_items(
            [{"number": number, "path": os.fsencode(path)} for number, path in enumerate(paths)],
            override_num_blocks=-(-len(paths) // HEADERS),
        )
        read = parts.map_batches(_headers_of, batch_size=None, batch_format="pyarrow")
        with _explaining():
            for row in read.iter_rows():
                yield row["number"], json.loads(row["header"])

    def answers(self, pending: Sequence[Numbered]) -> Iterator[tuple[int, Asked]]:
        """The results of each image, as they come."""
        if not pending:
            return
        _quieten()
        parts = ray.data.from_items(
            [_packed(*numbered) for numbered in pending],
            override_num_blocks=-(-len(pending) // PART),
        )
        answered = parts.map_batches(
            Worker,
            fn_constructor_args=(self._recipe,),
            batch_size=None,  # a part at a time
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(size=self._workers),
            num_cpus=self._needs["num_cpus"],
            num_gpus=self._needs["num_gpus"],
        )
        with _explaining():
            for row in answered.iter_rows():
                yield row["number"], Asked(*_unless_failed(row["told"]))

    def _check_size(self, there: Mapping[str, float]) -> None:
        for name, needed in (("CPU", "num_cpus"), ("GPU", "num_gpus")):
            wanted, has = (self._workers or 1) * self._needs[needed], int(there.get(name, 0))
            if wanted > has:
                raise ResourceError(
                    f"The cluster has {has} {name}s, and the workers would need {wanted}.",
                    "Ask for fewer with --workers, or add machines.",
                )


class Worker:
    """One process of the cluster, and its engine."""

    def __init__(self, recipe: Recipe) -> None:
        self._limit = recipe.max_new_tokens
        self._engine, self._failure = None, ""
        try:
            self._engine = recipe.load()
        except MedMoEError as error:
            self._failure = _failure(error)

    def __call__(self, part: pyarrow.Table) -> pyarrow.Table:
        """The results of a part: of each `number` what there is to tell."""
        results = [
            {"number": row["number"], "told": self._told(_unpacked(row["item"]))}
            for row in part.to_pylist()
        ]
        return pyarrow.Table.from_pylist(results)

    def _told(self, item: Item) -> str:
        if self._engine is None:
            return self._failure
        return json.dumps({"found": answer(self._engine, item, self._limit)})


def _headers_of(part: pyarrow.Table) -> pyarrow.Table:
    rows = part.to_pylist()
    headers = [json.dumps(header_of(os.fsdecode(row["path"]))) for row in rows]
    return pyarrow.table({"number": [row["number"] for row in rows], "header": headers})


def _identify(recipe: Recipe, questions: Sequence[str]) -> str:
    try:
        return json.dumps({"found": check(recipe.load(), questions, recipe.max_new_tokens)})
    except MedMoEError as error:
        return _failure(error)


def _failure(error: MedMoEError) -> str:
    return json.dumps({"failed": [error.exit_code, error.what, error.remedy]})


def _unless_failed(told: str) -> Any:
    """What a worker found; raises what it could not."""
    values = json.loads(told)
    if "failed" in values:
        code, what, remedy = values["failed"]
        raise KINDS[code](what, remedy)
    return values["found"]


def _packed(number: int, item: Item) -> dict[str, Any]:
    """An image or a series as a row of a table; JSON also has the paths that are no text."""
    notices = [dataclasses.asdict(notice) for notice in item.notices]
    return {"number": number, "item": json.dumps([*item[:-1], notices])}


def _unpacked(text: str) -> Item:
    image, path, questions, slices, of, notices = json.loads(text)
    told = tuple(Notice(**notice) for notice in notices)
    return Item(image, path, tuple(questions), tuple(map(tuple, slices)), of, told)


def _environment() -> dict[str, Any]:
    """What workers get of this process's: its keys, as a machine without any opens anything."""
    if TRUSTED_KEYS not in os.environ:
        return {}
    keys = os.environ[TRUSTED_KEYS]
    if not keys:
        raise InputError(
            f"{TRUSTED_KEYS} is set, but empty.", "Give a file of public keys, or unset it."
        )
    return {"runtime_env": {"env_vars": {TRUSTED_KEYS: os.path.abspath(keys)}}}


def _check_reachable(address: str) -> None:
    """Fail in seconds where nobody listens; Ray itself would try for minutes."""
    place = urlsplit(address if "://" in address else f"//{address}")
    try:
        if place.hostname and place.port:
            socket.create_connection((place.hostname, place.port), REACHING).close()
    except (OSError, ValueError) as error:
        raise _no_cluster(error, address) from error


def _no_cluster(error: Exception, address: str) -> ResourceError:
    if address == LOCAL:
        return ResourceError(
            f"Ray cannot be started on this machine ({type(error).__name__}).",
            "Look into the log of Ray's session; run it again when the machine is less busy.",
        )
    return ResourceError(
        f"There is no Ray cluster at that address ({type(error).__name__}).",
        "Start one (ray start --head), give its HOST:PORT, or: --ray local",
    )


@contextlib.contextmanager
def _explaining() -> Iterator[None]:
    """Around what the cluster does: its errors as ours."""
    try:
        yield
    except ray.exceptions.RayError as error:
        raise ResourceError(
            f"The workers of the cluster failed ({type(error).__name__}).",
            "What is done is kept: look into Ray's log, and run the same again.",
        ) from error


def _quieten() -> None:
    """Leave the terminal to us, and paths out of the log."""
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    ray.data.DataContext.get_current().enable_progress_bars = False
