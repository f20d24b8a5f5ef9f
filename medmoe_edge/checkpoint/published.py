"""Models that their authors published: names, which files make one, and where a folder came from.

`pulled.json`, which `hub.pull` writes into a folder, holds the repository, the commit and every
file's SHA-256; an export carries it into the bundle's manifest (`published`).
"""

import contextlib
import dataclasses
import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Self

from safetensors import SafetensorError, safe_open

from medmoe_edge.atomic import file_sha256, read_small
from medmoe_edge.bundle.bundle import MANIFEST
from medmoe_edge.bundle.trust import SIGNATURE
from medmoe_edge.errors import CheckpointError, InputError, of_file

RECORD = "pulled.json"
CONFIG = "config.json"
CARD = "README.md"
INDEX = "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".h5", ".msgpack", ".joblib")
CHECKPOINT_FILES = (".json", ".jinja", ".md", ".model", ".safetensors", ".tiktoken", ".txt")

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Published:
    """A model that its authors published: a folder in a repository of the Hub."""

    repository: str
    folder: str = ""

    def __str__(self) -> str:
        return "/".join(filter(None, (self.repository, self.folder)))


# By the names of our presets, where the authors' own pages say that their weights are:
# github.com/jiangsongtao/Med-MoE and github.com/PKU-YuanGroup/MoE-LLaVA (model zoo).
PUBLISHED: dict[str, Published] = {
    "med-moe-phi2-2.7b": Published("JsST/Med-MoE", "stage3/llavaphi-2.7b-medmoe"),
    "med-moe-stablelm-1.6b": Published("JsST/Med-MoE", "stage3/llavastablelm-1.6b-medmoe"),
    "moe-llava-phi2-2.7b": Published("LanguageBind/MoE-LLaVA-Phi2-2.7B-4e"),
    "moe-llava-phi2-2.7b-384": Published("LanguageBind/MoE-LLaVA-Phi2-2.7B-4e-384"),
    "moe-llava-stablelm-1.6b": Published("LanguageBind/MoE-LLaVA-StableLM-1.6B-4e"),
    "moe-llava-stablelm-1.6b-384": Published("LanguageBind/MoE-LLaVA-StableLM-1.6B-4e-384"),
    "moe-llava-qwen-1.8b": Published("LanguageBind/MoE-LLaVA-Qwen-1.8B-4e"),
}


def is_beside_model(file: Path, folder: Path) -> bool:
    """Whether a folder is a model's, and a file in it is none of the model's own."""
    name = file.name
    if not (folder / MANIFEST).is_file():
        return (folder / CONFIG).is_file() and _is_result(file)
    try:
        files = json.loads(read_small(folder / MANIFEST))["files"]
        return name not in (*files, MANIFEST, SIGNATURE, RECORD, CARD)
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return False  # whoever reads it says what is wrong


def _is_result(file: Path) -> bool:
    """Whether a verb wrote a file beside a checkpoint: answers, one a line, or statistics."""
    with contextlib.suppress(OSError, SafetensorError), safe_open(file, "np") as tensors:
        return str((tensors.metadata() or {}).get("format")).startswith("medmoe-edge ")
    try:
        with file.open("rb") as stream:
            first = json.loads(stream.readline(2**20))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(first, dict) and {"id", "prediction", "correct"} <= first.keys()


def find_published(name: str) -> Published:
    """What a name means; raises `InputError`, which lists the names."""
    if name in PUBLISHED:
        return PUBLISHED[name]
    parts = name.split("/")
    if len(parts) < 2 or not all(parts) or any(part in (".", "..") for part in parts):
        raise InputError(
            f"There is no published model {name!r}.",
            f"Use OWNER/REPOSITORY[/FOLDER], or one of: {', '.join(PUBLISHED)}.",
        )
    return Published("/".join(parts[:2]), "/".join(parts[2:]))


@dataclasses.dataclass(frozen=True)
class RemoteFile:
    """A file of a repository; of `sha256` and `git_sha1` at least one is known.

    `cached` is where the Hub's own cache holds it.
    """

    path: str
    size: int
    sha256: str | None
    git_sha1: str | None
    cached: Path | None = None

    @property
    def name(self) -> str:
        """Its name without the folder."""
        return PurePosixPath(self.path).name

    def hashes_of(self, file: Path) -> tuple[str, bool]:
        """The SHA-256 of a local file, and whether it is this one."""
        sha256, git = hashlib.sha256(), hashlib.sha1(usedforsecurity=False)
        git.update(b"blob %d\0" % file.stat().st_size)  # how git names its objects
        with file.open("rb") as content:
            while block := content.read(2**20):
                sha256.update(block)
                if self.sha256 is None:
                    git.update(block)
        found = sha256.hexdigest()
        if self.sha256 is not None:
            return found, found == self.sha256
        return found, git.hexdigest() == self.git_sha1


def chosen_files(source: Published, files: Sequence[RemoteFile]) -> tuple[RemoteFile, ...]:
    """What a checkpoint or bundle consists of, of all that a repository holds."""
    place = PurePosixPath(source.folder)
    inside = {file.name: file for file in files if PurePosixPath(file.path).parent == place}
    if MANIFEST in inside:
        chosen = {
            name: file
            for name, file in inside.items()
            if not name.startswith(".") and not name.endswith((*PICKLES, ".py"))
        }
    elif CONFIG in inside:
        chosen = {
            name: file
            for name, file in inside.items()
            if name.endswith(CHECKPOINT_FILES) or name.startswith(("LICENSE", "LICENCE"))
        }
        _check_weights(source, inside, chosen)
    else:
        raise _no_model(source, files)
    for file in files:  # a card that speaks of the whole repository
        if file.path == CARD:
            chosen.setdefault(CARD, file)
    chosen.pop(RECORD, None)  # ours is written anew
    return tuple(sorted(chosen.values(), key=lambda file: file.name))


def _check_weights(
    source: Published, inside: Mapping[str, RemoteFile], chosen: Mapping[str, RemoteFile]
) -> None:
    if any(name.endswith(".safetensors") for name in chosen):
        return
    if pickles := sorted(name for name in inside if name.endswith(PICKLES)):
        raise CheckpointError(
            f"{source} holds its weights only as {', '.join(pickles)}: a pickle may run any code "
            "and is never loaded.",
            "Ask its authors for safetensors, or convert in a sandbox with "
            "safetensors.torch.save_file.",
        )
    raise CheckpointError(f"{source} holds no weights.", "Check the folder's name.")


def _no_model(source: Published, files: Sequence[RemoteFile]) -> InputError:
    folders = {
        str(PurePosixPath(file.path).parent) for file in files if file.name in (CONFIG, MANIFEST)
    } - {"."}
    names = ", ".join(f"{source.repository}/{folder}" for folder in sorted(folders))
    return InputError(
        f"{source} holds neither {CONFIG} nor {MANIFEST}.",
        f"Use one of: {names}." if names else "Give the repository of a model.",
    )


def check_shards(source: Published, files: Mapping[str, Path | None]) -> None:
    """Raise `CheckpointError` where the index names a shard that is not among the files.

    `files` are by name; where the index lies must be known.
    """
    index = files.get(INDEX)
    if index is None:
        return
    try:
        shards = set(json.loads(index.read_bytes())["weight_map"].values())
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{INDEX} of {source} is damaged.", "Tell its authors.") from error
    if missing := sorted(str(shard) for shard in shards if shard not in files):
        raise CheckpointError(
            f"{source} lacks {', '.join(missing)}, which its {INDEX} names.",
            "Its upload is incomplete: use another revision, or tell its authors.",
        )


@dataclasses.dataclass(frozen=True)
class Pulled:
    """A folder as it was fetched; `files` maps names to `{"bytes", "sha256"}`."""

    folder: Path
    repository: str
    path: str
    revision: str
    commit: str
    endpoint: str
    files: Mapping[str, Mapping[str, Any]]

    def __str__(self) -> str:
        size = sum(int(entry["bytes"]) for entry in self.files.values())
        source = Published(self.repository, self.path)
        return f"{size / 1e9:.2f} GB of {source} (commit {self.commit[:12]})"

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, the folder aside."""
        own = dataclasses.asdict(self)
        del own["folder"]
        return own

    @classmethod
    def of(cls, folder: Path) -> Self | None:
        """The record in a folder; None where it was not pulled. Raises `CheckpointError`."""
        file = folder / RECORD
        if not file.exists():
            return None
        try:
            data = json.loads(read_small(file))
            files = {
                name: {"bytes": int(e["bytes"]), "sha256": str(e["sha256"])}
                for name, e in data["files"].items()
            }
            repository, path, revision, commit, endpoint = (
                str(data[name]) for name in ("repository", "path", "revision", "commit", "endpoint")
            )
            return cls(folder, repository, path, revision, commit, endpoint, files)
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            remedy = "Remove it, or pull the checkpoint again."
            damaged = CheckpointError(f"{file} is damaged.", remedy)
            raise of_file(str(file), error, damaged) from error


def published(folder: Path, hashes: Mapping[str, str]) -> dict[str, Any]:
    """What a manifest's `source` says of where a checkpoint was published.

    Args:
        folder: The checkpoint's.
        hashes: SHA-256 of files of it that were hashed already, by name.

    Returns:
        `published`: the record of the `pull`, with the names of files that were changed or removed
        since under `changed`. Nothing where the folder was not pulled.

    Raises:
        CheckpointError: The record is damaged.
    """
    pulled = Pulled.of(folder)
    if pulled is None:
        return {}
    recorded = {name: entry["sha256"] for name, entry in pulled.files.items()}
    changed = []
    for name, sha256 in recorded.items():
        path = folder / name
        found = hashes.get(name) or (file_sha256(path) if path.is_file() else None)
        if found != sha256:
            changed.append(name)
    if changed:
        log.warning("%s: changed since it was pulled: %s.", folder, ", ".join(changed))
    return {"published": {**pulled.to_json(), "files": recorded, "changed": changed}}
