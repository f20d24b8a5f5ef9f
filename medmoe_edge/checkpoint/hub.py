"""Published weights, and bundles, from the Hugging Face Hub.

`pull` resolves a revision to its commit once and takes every file at that commit. What is fetched
is compared with the hashes that the Hub's listing states (SHA-256 of large files, git's SHA-1 of
small ones), and written beside its place until all of it is there: a broken download goes on where
it was. Pickles (`.bin`, `.pt`, ...) and code are never fetched, for neither is ever run.
"""

import dataclasses
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from medmoe_edge._types import Progress, no_progress
from medmoe_edge.atomic import atomic_folder, check_target
from medmoe_edge.bundle.bundle import MANIFEST
from medmoe_edge.checkpoint.published import (
    PUBLISHED,
    RECORD,
    Published,
    Pulled,
    RemoteFile,
    check_shards,
    chosen_files,
    find_published,
)
from medmoe_edge.errors import CheckpointError, InputError, Options, ResourceError, needs

if TYPE_CHECKING:
    from huggingface_hub import HfApi

LARGE = 2**26  # bytes; smaller files of the cache are copied, so that both can be edited apart
COMMIT = 40  # hexadecimal digits of a commit
TIMEOUT = 10.0  # seconds until a server that says nothing counts as out of reach

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class PullOptions(Options):
    """How weights are fetched.

    Attributes:
        revision: A branch, a tag or a commit.
        endpoint: The Hub's address; None: `HF_ENDPOINT`, else huggingface.co.
        cache: Where files that were fetched before are looked for; None: `HF_HUB_CACHE`.
        force: Replace a folder that an earlier `pull` wrote.
        free_space: Bytes free in a folder.
    """

    revision: str = "main"
    endpoint: str | None = None
    cache: Path | None = None
    force: bool = False
    free_space: Callable[[Path], int] = lambda folder: shutil.disk_usage(folder).free


@dataclasses.dataclass(frozen=True)
class Listing:
    """What is to be fetched: the files of one folder of a repository at one commit."""

    source: Published
    endpoint: str
    revision: str
    commit: str
    files: tuple[RemoteFile, ...]

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)


def pull(
    name: str,
    out: Path,
    options: PullOptions | None = None,
    *,
    progress: Progress = no_progress,
) -> Pulled:
    """Fetch a published checkpoint, or a bundle, into the folder `out`.

    Args:
        name: One of `PUBLISHED`, or `OWNER/REPOSITORY[/FOLDER]`.
        out: The folder, which appears whole or not at all. What an interrupted run fetched lies
            beside it in `.OUT.pull` and is used by the next.
        options: Revision, place and cache.
        progress: Told of bytes.

    Returns:
        What was fetched, as `pulled.json` records it.

    Raises:
        InputError: There is no such name, repository, folder or revision, or `out` exists.
        CheckpointError: Nothing there may be loaded, or a file's hash is not the one stated.
        ResourceError: The network, or room on the disk, is missing.
        MissingDependencyError: The extra `hub` is not installed.
    """
    options = options or PullOptions()
    source = find_published(name)
    check_target(out, force=options.force, marker=RECORD)
    with needs("hub"):
        import huggingface_hub  # noqa: F401 -- missing is told before anything is done
        from filelock import FileLock, Timeout
    listing = find_files(source, options)
    out = out.resolve()
    staging = out.with_name(f".{out.name}.pull")
    _check_space(listing, staging, options)
    with _writing(out):
        staging.mkdir(parents=True, exist_ok=True)
    lock = Path(f"{staging}.lock")
    try:
        with FileLock(lock, timeout=0):
            pulled = _fetch_all(listing, staging, out, options, progress)
            lock.unlink(missing_ok=True)
            return pulled
    except Timeout as error:
        raise ResourceError(
            f"{out} is being written by another pull.", "Wait for it, or choose another name."
        ) from error


def find_files(source: Published, options: PullOptions) -> Listing:
    """Ask the Hub, or where it is out of reach its cache, what is to be fetched.

    Raises `InputError`, `CheckpointError` and `ResourceError` as `pull` does.
    """
    from huggingface_hub import HfApi

    api = HfApi(endpoint=options.endpoint, library_name="medmoe-edge")
    try:
        with _explained(api, source, options):
            commit = _commit(api, source, options)
            found = list(_listed(api, source, commit, options))
    except _OutOfReach as error:
        listing = _cached(api, source, options)
        if listing is None:
            raise ResourceError(error.what, error.remedy) from error
        if not isinstance(error, _Offline):
            log.warning("%s Taken from the cache: commit %s.", error.what, listing.commit[:12])
        return listing
    return Listing(source, api.endpoint, options.revision, commit, chosen_files(source, found))


class _OutOfReach(ResourceError):
    """The Hub does not answer, or must not be asked."""


class _Offline(_OutOfReach):
    """It was wished that nothing be asked."""


@contextmanager
def _explained(api: "HfApi", source: Published, options: PullOptions) -> Iterator[None]:
    """Turn what `huggingface_hub` raises into errors for the person."""
    from huggingface_hub import errors

    try:
        yield
    except errors.OfflineModeIsEnabled as error:
        raise _Offline(
            f"HF_HUB_OFFLINE is set, and {source} is not whole in the cache.",
            "Unset HF_HUB_OFFLINE, or copy the cache of a machine that has it (HF_HOME).",
        ) from error
    except errors.GatedRepoError as error:
        raise InputError(
            f"{source.repository} is given to those only who ask for it.",
            f"Ask on {api.endpoint}/{source.repository}, then set HF_TOKEN.",
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise InputError(
            f"{api.endpoint} has no repository {source.repository} (or shows it to its owners).",
            f"Check its name, set HF_TOKEN if it is private, or use one of: "
            f"{', '.join(PUBLISHED)}.",
        ) from error
    except errors.RevisionNotFoundError as error:
        raise InputError(
            f"{source.repository} has no revision {options.revision!r}.",
            f"Use {_revisions(api, source)}or a commit of {COMMIT} digits.",
        ) from error
    except errors.HfHubHTTPError as error:
        status = getattr(error.response, "status_code", "no")
        if status in (401, 403):
            raise InputError(
                f"{api.endpoint} does not show {source.repository} to you (status {status}).",
                "Set HF_TOKEN to a token of an account that may see it.",
            ) from error
        raise _OutOfReach(
            f"{api.endpoint} answered with status {status}.",
            "Try again later, or set HF_ENDPOINT to a mirror.",
        ) from error
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise _OutOfReach(
            f"{api.endpoint} does not answer as the Hub does ({type(error).__name__}).",
            "Set HF_ENDPOINT to the Hub or a mirror of it; a proxy may have answered.",
        ) from error
    except Exception as error:
        if not _of_the_network(error):
            raise
        raise _OutOfReach(
            f"{api.endpoint} cannot be reached ({type(error).__name__}).",
            "Check the network, or set HF_ENDPOINT to a mirror; what was fetched is kept.",
        ) from error


def _of_the_network(error: Exception) -> bool:
    """Whether the client's transport failed: `huggingface_hub` lets its errors through as they are.

    The client is httpx or a fork of it, by version; both call the base of these `TransportError`.
    """
    return any(kind.__name__ == "TransportError" for kind in type(error).__mro__)


def _revisions(api: "HfApi", source: Published) -> str:
    """The branches and tags there are, for a sentence; empty where they cannot be asked."""
    try:
        refs = api.list_repo_refs(source.repository)
    except Exception:  # only to help: the error that is being told stands
        return ""
    names = [ref.name for ref in (*refs.branches, *refs.tags)]
    return f"one of: {', '.join(names)}; " if names else ""


def _commit(api: "HfApi", source: Published, options: PullOptions) -> str:
    found = api.model_info(source.repository, revision=options.revision, timeout=TIMEOUT).sha
    if not found:
        raise ResourceError(
            f"{api.endpoint} names no commit for {source.repository}.",
            "Set HF_ENDPOINT to a complete mirror of the Hub.",
        )
    return found


def _listed(
    api: "HfApi", source: Published, commit: str, options: PullOptions
) -> Iterator[RemoteFile]:
    """Every file of the repository, with where the cache has it."""
    from huggingface_hub import RepoFile, try_to_load_from_cache

    for entry in api.list_repo_tree(source.repository, recursive=True, revision=commit):
        if not isinstance(entry, RepoFile):
            continue
        cached = try_to_load_from_cache(
            source.repository, entry.path, cache_dir=options.cache, revision=commit
        )
        yield RemoteFile(
            entry.path,
            entry.size,
            entry.lfs.sha256 if entry.lfs else None,
            entry.blob_id,
            Path(cached) if isinstance(cached, str) else None,
        )


def _cached(api: "HfApi", source: Published, options: PullOptions) -> Listing | None:
    """The same from the cache alone; None where it does not hold the whole folder.

    The cache names a file's content by its hash: SHA-256 of large files, git's SHA-1 of others.
    """
    from huggingface_hub import CacheNotFound, scan_cache_dir

    try:
        repositories = scan_cache_dir(options.cache).repos
    except CacheNotFound:
        return None
    for repository in repositories:
        if repository.repo_type != "model" or repository.repo_id != source.repository:
            continue
        for revision in repository.revisions:
            if options.revision not in (revision.commit_hash, *revision.refs):
                continue
            files = []
            for file in revision.files:
                known = file.blob_path.name
                path = file.file_path.relative_to(revision.snapshot_path).as_posix()
                sha256, git = (known, None) if len(known) == 64 else (None, known)
                files.append(RemoteFile(path, file.size_on_disk, sha256, git, file.file_path))
            try:
                chosen = chosen_files(source, files)
                check_shards(source, {file.name: file.cached for file in chosen})
            except (InputError, CheckpointError):
                return None
            commit = revision.commit_hash
            return Listing(source, api.endpoint, options.revision, commit, chosen)
    return None


def _check_space(listing: Listing, staging: Path, options: PullOptions) -> None:
    """Raise `ResourceError` where the disk has no room for what is not there yet."""
    place = next(folder for folder in staging.parents if folder.is_dir())
    needed = sum(file.size - _there(file, staging) for file in listing.files)
    free = options.free_space(place)
    if needed > free:
        raise ResourceError(
            f"{listing.source} takes {needed / 1e9:.2f} GB more, and {free / 1e9:.2f} GB are free "
            f"in {place}.",
            "Free some space, or write to another disk.",
        )


def _there(file: RemoteFile, staging: Path) -> int:
    """Bytes that need no further room: begun, complete, or to be linked to the cache."""
    for begun in (staging / file.name, _part(file, staging)):
        if begun.exists():
            return min(begun.stat().st_size, file.size)
    place = next(folder for folder in staging.parents if folder.is_dir())
    shared = file.cached is not None and file.cached.stat().st_dev == place.stat().st_dev
    return file.size if shared and file.size >= LARGE else 0


def _part(file: RemoteFile, staging: Path) -> Path:
    """A file while it is being fetched; named by its content, so that two never mix."""
    return staging / f"{file.name}.{(file.sha256 or file.git_sha1 or '')[:16]}.part"


def _fetch_all(
    listing: Listing, staging: Path, out: Path, options: PullOptions, progress: Progress
) -> Pulled:
    done, records = 0, {}
    places: dict[str, Path | None] = {file.name: staging / file.name for file in listing.files}
    weights = [file for file in listing.files if file.name.endswith(".safetensors")]
    for file in (*(each for each in listing.files if each not in weights), *weights):
        if weights and file is weights[0]:  # gigabytes, which an incomplete upload is not worth
            check_shards(listing.source, places)
        report = partial(_report, progress, file.name, done, listing.size)
        with _writing(out):
            sha256 = _fetch(listing, file, staging, options, report)
        records[file.name] = {"bytes": file.size, "sha256": sha256}
        done += file.size
    _check_manifest(listing, staging, records)
    pulled = Pulled(
        out,
        listing.source.repository,
        listing.source.folder,
        listing.revision,
        listing.commit,
        listing.endpoint,
        records,
    )
    with atomic_folder(out, force=options.force, marker=RECORD) as folder:
        for file in listing.files:
            (staging / file.name).rename(folder / file.name)
        (folder / RECORD).write_text(json.dumps(pulled.to_json(), indent=1) + "\n", "utf-8")
    shutil.rmtree(staging, ignore_errors=True)
    return pulled


def _check_manifest(
    listing: Listing, staging: Path, records: Mapping[str, Mapping[str, Any]]
) -> None:
    """Raise `CheckpointError` for a bundle whose files are not those of its manifest."""
    if MANIFEST not in records:
        return
    try:
        promised = json.loads((staging / MANIFEST).read_bytes())["files"]
        wrong = [name for name, entry in promised.items() if records.get(name) != entry]
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        wrong = [MANIFEST]
    if wrong:
        raise CheckpointError(
            f"{listing.source} is a bundle whose {', '.join(sorted(wrong))} is missing or is not "
            "what its manifest states.",
            "Ask who pushed it to push the whole folder.",
        )


def _report(progress: Progress, name: str, before: int, total: int, fetched: int) -> None:
    progress(name, before + fetched, total)


def _fetch(
    listing: Listing,
    file: RemoteFile,
    staging: Path,
    options: PullOptions,
    report: Callable[[int], None],
) -> str:
    """One file into `staging`, checked; returns its SHA-256."""
    target = staging / file.name
    if target.exists():  # of an earlier run, maybe of another commit
        sha256, right = file.hashes_of(target)
        if right:
            return sha256
        target.unlink()
    part = _part(file, staging)
    if file.cached is not None:
        part.unlink(missing_ok=True)  # it may be another name of the cached file: never appended to
        _take(file, part)
    else:
        _download(listing, file, part, options, report)
    sha256, right = file.hashes_of(part)
    if not right:
        part.unlink()
        origin = "the cache" if file.cached is not None else listing.endpoint
        raise CheckpointError(
            f"{file.path} of {listing.source.repository} is not what the Hub lists: its hash "
            f"differs, as it came from {origin}.",
            "Run the command again: the damaged file was removed, all others are kept."
            if file.cached is None
            else f"Remove {file.cached.resolve()}, and run the command again.",
        )
    part.rename(target)
    return sha256


def _take(file: RemoteFile, part: Path) -> None:
    """From the cache: large files as a second name of the same bytes, where the disk can."""
    assert file.cached is not None
    cached = file.cached.resolve()
    if file.size >= LARGE:
        try:
            os.link(cached, part)
            return
        except OSError:
            log.debug("%s cannot be linked and is copied", cached)
    shutil.copyfile(cached, part)


def _download(
    listing: Listing,
    file: RemoteFile,
    part: Path,
    options: PullOptions,
    report: Callable[[int], None],
) -> None:
    """Go on with a file where it stands.

    `huggingface_hub` keeps no part of a file that broke off in another process, so that its lower
    function is called, which goes on at an offset.
    """
    from huggingface_hub import HfApi, get_hf_file_metadata, hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # it does

    begun = part.stat().st_size if part.exists() else 0
    if begun > file.size:
        part.unlink()
        begun = 0
    url = hf_hub_url(
        listing.source.repository,
        file.path,
        revision=listing.commit,
        endpoint=listing.endpoint,
    )
    headers = build_hf_headers(library_name="medmoe-edge")
    api = HfApi(endpoint=listing.endpoint)
    with _explained(api, listing.source, options):
        found = get_hf_file_metadata(url, timeout=TIMEOUT, headers=headers, retry_on_errors=True)
        if found.location.split("/")[2] != url.split("/")[2]:  # a storage signs its own addresses
            headers.pop("authorization", None)
        with part.open("ab") as content:
            http_get(
                found.location,
                content,
                resume_size=begun,
                headers=headers,
                expected_size=file.size,
                tqdm_class=partial(_Bar, report),  # type: ignore[arg-type]  # stands in for one
            )


class _Bar:
    """Stands in for a tqdm bar of one file and tells how many bytes are there."""

    def __init__(self, report: Callable[[int], None], *, initial: int = 0, **_: object) -> None:
        self._report, self._done = report, initial

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def update(self, count: float = 1) -> None:
        """`count` more bytes."""
        self._done += int(count)
        self._report(self._done)


@contextmanager
def _writing(out: Path) -> Iterator[None]:
    """Turn what the disk refuses into `ResourceError`; what was fetched stays."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or "a file came short"
        raise ResourceError(
            f"{out} could not be fetched whole ({reason}).",
            "Free some space and run the command again: it goes on where it was.",
        ) from error
