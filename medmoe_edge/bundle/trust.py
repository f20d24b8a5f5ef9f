"""What is believed of a bundle: who signed it, and which of its files were found intact before.

    manifest.sig    Ed25519 (RFC 8032) over the bytes of manifest.json: 64 bytes, nothing else

The manifest holds size and hash of every other file, so that its signature covers the whole bundle.
Keys are PEM files as OpenSSL writes them, and `openssl pkeyutl -verify` checks the same signature.

Where the environment variable `MEDMOE_EDGE_TRUSTED_KEYS` names a file of public keys, no model is
opened that none of them has signed, by whatever verb, service or Python call. A manifest that this
very process wrote needs no signature: so a bundle can be verified while it is made.

Large files that were found intact before, so that gigabytes are not hashed at every start.

A file counts as unchanged while its size, its times, and its place on the disk are those of when it
was hashed last; its `ctime` is set by every write and by no user. A file that was written in the
very seconds before it was hashed is not trusted, since a later write could leave the same times
(git's index has the same rule, and calls such files racy). What the disk itself loses goes
unnoticed until the record is removed; of an expert, until it is paged in.

What might never end, a pipe or a device in the place of a model's file, is not read.
"""

import contextlib
import hashlib
import json
import os
import re
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from medmoe_edge.atomic import atomic_file, file_sha256, read_small
from medmoe_edge.errors import BundleError, InputError, needs, unreadable

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import (
        Ed25519PrivateKey,
        Ed25519PublicKey,
    )

SIGNATURE = "manifest.sig"
TRUSTED_KEYS = "MEDMOE_EDGE_TRUSTED_KEYS"
PUBLIC = re.compile(rb"-----BEGIN PUBLIC KEY-----.*?-----END PUBLIC KEY-----", re.DOTALL)
LARGEST = 2**20  # bytes of a file of keys
LARGE = 2**26  # bytes; smaller files are hashed faster than looked up
SETTLED = 2_000_000_000  # nanoseconds without a write
MAKE_ONE = "Make one: (umask 077; openssl genpkey -algorithm ed25519 -out FILE)"
SIGN_IT = "Have it signed by who may: medmoe-edge verify BUNDLE --sign KEY"

Signed = Literal["none", "not checked", "trusted"]

_written: set[str] = set()  # SHA-256 of the manifests that this process wrote or vouches for


def keys_are_trusted() -> bool:
    """Whether trusted keys are configured, so that nothing is used but what one of them signed."""
    return TRUSTED_KEYS in os.environ


def vouch_for(manifest: bytes) -> None:
    """Let this process open a bundle with this manifest, whoever signed it."""
    _written.add(hashlib.sha256(manifest).hexdigest())


def check_signature(folder: Path, manifest: bytes) -> None:
    """Raise `BundleError` for a manifest that no trusted key has signed.

    Without trusted keys nothing is checked. Raises `InputError` for keys that cannot be read, and
    `MissingDependencyError`: where keys are configured, nothing is opened unchecked.
    """
    if not keys_are_trusted() or hashlib.sha256(manifest).hexdigest() in _written:
        return
    keys = list(_trusted_keys())
    try:
        signature = read_small(folder / SIGNATURE)
    except OSError as error:
        raise BundleError(
            f"{folder} is not signed, and {TRUSTED_KEYS} asks for a signature.", SIGN_IT
        ) from error
    if not any(_has_signed(key, signature, manifest) for key in keys):
        raise BundleError(
            f"{folder} is signed by no trusted key, or its manifest was changed since.",
            "Do not use it before you know where it is from; copy it again, or have it signed.",
        )


def check_checkpoint(folder: Path) -> None:
    """Raise `BundleError` where trusted keys are configured: checkpoints have no signature."""
    if keys_are_trusted():
        raise BundleError(
            f"{folder} is a checkpoint, and {TRUSTED_KEYS} allows signed bundles alone.",
            "Export it, and sign the bundle: medmoe-edge export CHECKPOINT --sign KEY",
        )


def is_signed(folder: Path) -> bool:
    """Whether a bundle carries a signature, of whomever."""
    return (folder / SIGNATURE).exists()


def signed(folder: Path) -> Signed:
    """How a bundle is signed that was opened with its files checked.

    Where keys are trusted, it is by one of them, or it would not have been opened.
    """
    if not is_signed(folder):
        return "none"
    return "trusted" if keys_are_trusted() else "not checked"


def write_signature(folder: Path, manifest: bytes, key: "Ed25519PrivateKey") -> None:
    """Sign a manifest, whole or not at all."""
    with atomic_file(folder / SIGNATURE) as file:
        file.write(key.sign(manifest))


def read_private_key(path: Path) -> "Ed25519PrivateKey":
    """A key to sign with, from a PEM file that its owner alone may read.

    Raises `InputError` for a file of others' too, for another kind of key and for one under a
    password, and `MissingDependencyError`.
    """
    with needs("sign"):
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
        from cryptography.hazmat.primitives.serialization import load_pem_private_key
    text, mode = _read(path, "The key")
    if os.name == "posix" and mode & 0o077:
        raise InputError(
            f"Others than its owner may use the key {path}.",
            f"Make it yours alone: chmod 600 {path}",
        )
    try:
        key = load_pem_private_key(text, password=None)
    except TypeError as error:
        raise InputError(
            f"The key {path} is protected by a password.",
            "Give it without, in memory: openssl pkey -in KEY -out /dev/shm/KEY",
        ) from error
    except (ValueError, UnsupportedAlgorithm) as error:
        raise InputError(f"{path} holds no private key in PEM.", MAKE_ONE) from error
    if not isinstance(key, Ed25519PrivateKey):
        raise InputError(f"The key {path} is not of the kind Ed25519.", MAKE_ONE)
    return key


def _trusted_keys() -> "Iterator[Ed25519PublicKey]":
    with needs("sign"):
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
        from cryptography.hazmat.primitives.serialization import load_pem_public_key
    path = Path(os.environ[TRUSTED_KEYS])
    found: list[bytes] = PUBLIC.findall(_read(path, f"{TRUSTED_KEYS}: {path}")[0])
    remedy = "Write them with: openssl pkey -in KEY -pubout"
    if not found:
        raise InputError(f"{TRUSTED_KEYS}: {path} holds no public key in PEM.", remedy)
    for text in found:
        try:
            key: Any = load_pem_public_key(text)
        except (ValueError, UnsupportedAlgorithm) as error:
            raise InputError(f"{TRUSTED_KEYS}: {path} holds a damaged key.", remedy) from error
        if not isinstance(key, Ed25519PublicKey):
            raise InputError(f"{TRUSTED_KEYS}: {path} holds a key other than Ed25519.", remedy)
        yield key


def _has_signed(key: "Ed25519PublicKey", signature: bytes, manifest: bytes) -> bool:
    from cryptography.exceptions import InvalidSignature

    try:
        key.verify(signature, manifest)
    except InvalidSignature:
        return False
    return True


def _read(path: Path, what: str) -> tuple[bytes, int]:
    """A small file and its mode."""
    try:
        with path.open("rb") as file:
            return file.read(LARGEST), stat.S_IMODE(os.fstat(file.fileno()).st_mode)
    except OSError as error:
        raise InputError(*unreadable(what, error)) from error


def hashes_to(path: Path, sha256: str) -> bool:
    """Whether a large file has this hash; it is read only where that is not known."""
    seen = settled(path)
    if was_intact(path, sha256):
        return True
    right = file_sha256(path) == sha256
    if right:
        remember_intact(path, sha256, seen)
    return right


def was_intact(path: Path, sha256: str) -> bool:
    """Whether the file, as it is now, was found to have this hash before."""
    return _read_record(_record(path)) == _state(path.stat(), sha256)


def settled(path: Path) -> os.stat_result | None:
    """What the file is, before it is hashed: a write meanwhile then counts. None if it is new."""
    seen = path.stat()
    return None if time.time_ns() - seen.st_ctime_ns < SETTLED else seen


def remember_intact(path: Path, sha256: str, seen: os.stat_result | None) -> None:
    """Keep in the user's cache that the file, as it was `settled`, has this hash.

    Where the cache cannot be written, the file is hashed again next time.
    """
    if seen is None:
        return
    record = _record(path)
    with contextlib.suppress(OSError):
        record.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(record) as file:
            file.write(json.dumps(_state(seen, sha256)).encode())


def _state(seen: os.stat_result, sha256: str) -> list[str | int]:
    times = (seen.st_mtime_ns, seen.st_ctime_ns)
    return [sha256, seen.st_size, *times, seen.st_ino, seen.st_dev]


def _record(path: Path) -> Path:
    import platformdirs  # a small model never needs it

    name = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()
    return platformdirs.user_cache_path("medmoe-edge") / "intact" / f"{name}.json"


def _read_record(record: Path) -> object:
    with contextlib.suppress(OSError, ValueError):
        return json.loads(record.read_bytes())
    return None
