"""An audit log sent on to a collector, line by line: syslog over TLS.

Messages are those of RFC 5424 with the log's line as their text, in the frames of RFC 5425. What
was sent is remembered beside the log, in `LOG.shipped`, so that the next run goes on behind it.
Syslog confirms nothing: a line counts as sent once the connection has taken it, and a connection
that breaks loses what was still under way. The lines carry numbers and a chain of hashes, so the
collector sees what is missing.
"""

import contextlib
import datetime
import json
import os
import socket
import ssl
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from medmoe_edge.atomic import atomic_file
from medmoe_edge.bedside.audit.log import GENESIS, MAX_LINE, parse
from medmoe_edge.errors import DataError, InputError, ResourceError

PRIORITY = 13 * 8 + 6  # facility "log audit", severity "informational"
PORT = 6514  # of syslog over TLS
PAUSE = 1.0  # seconds until the log is looked at again
PATIENCE = 10.0  # seconds for the collector to answer


@dataclass(frozen=True)
class Collector:
    """Where a log is sent.

    Attributes:
        host: A name that the collector's certificate is for.
        port: Its port.
        authority: PEM of whom its certificate is from; None is whom this machine trusts.
        certificate: PEM of this machine's own, where the collector asks for one.
        key: PEM of its key.
    """

    host: str
    port: int = PORT
    authority: Path | None = None
    certificate: Path | None = None
    key: Path | None = None

    @classmethod
    def at(cls, place: str, **files: Path | None) -> "Collector":
        """From `HOST`, `HOST:PORT` or `[ADDRESS]:PORT`; raises `InputError`."""
        host, colon, port = place.rpartition(":")
        if not colon or place.endswith("]"):
            host, port = place, str(PORT)
        if not host.strip("[]") or not port.isdecimal() or not 0 < int(port) < 2**16:
            raise InputError(f"{place!r} is not HOST or HOST:PORT.", f"Syslog's is {PORT}.")
        return cls(host.strip("[]"), int(port), **files)

    @contextlib.contextmanager
    def connected(self) -> Iterator[ssl.SSLSocket]:
        """A connection; raises `InputError` for files of no use, and `ResourceError`."""
        try:
            context = ssl.create_default_context(cafile=self.authority)
            if self.certificate is not None:
                context.load_cert_chain(self.certificate, self.key)
        except (OSError, ValueError) as error:
            raise InputError(
                f"The certificates cannot be used ({type(error).__name__}).", "Give PEM files."
            ) from error
        try:
            with (
                socket.create_connection((self.host, self.port), PATIENCE) as plain,
                context.wrap_socket(plain, server_hostname=self.host) as connection,
            ):
                connection.settimeout(PATIENCE)
                yield connection
                with contextlib.suppress(OSError):  # it may just close
                    connection.unwrap()  # or closing would throw away what is under way
        except OSError as error:
            why = error.strerror or type(error).__name__
            raise ResourceError(
                f"The collector {self.host}, port {self.port}, takes no entries ({why}).",
                "Check its address and its certificate; what was not sent is sent next time.",
            ) from error


def ship(path: Path, collector: Collector, *, follow: bool = False) -> int:
    """Send what was not sent yet.

    Args:
        path: The audit log.
        collector: Where to.
        follow: Whether to wait for further lines, until a signal ends it.

    Returns:
        How many lines were sent.

    Raises:
        InputError: The log or a certificate cannot be read.
        DataError: The log does not go on from what was sent: it was cut or changed.
        ResourceError: The collector cannot be reached.
    """
    sent = 0
    try:
        with path.open("rb") as file, collector.connected() as connection:
            number, head = _skip(file, path)
            while True:
                for line in _whole_lines(file):
                    entry = parse(line)
                    if entry is None or (entry["number"], entry["previous"]) != (number + 1, head):
                        raise _broken(number + 1)
                    connection.sendall(_frame(line, str(entry["time"])))
                    number, head = entry["number"], entry["hash"]
                    sent += 1
                _remember(path, number, head)
                if not follow:
                    return sent
                time.sleep(PAUSE)
    except FileNotFoundError as error:
        raise InputError(f"There is no audit log {path}.", "Check the path.") from error


def _skip(file: IO[bytes], path: Path) -> tuple[int, str]:
    """Read on to behind the last line that was sent; its number and hash."""
    try:
        told = json.loads(_shipped(path).read_bytes())
        number, head = int(told["number"]), str(told["hash"])
    except FileNotFoundError:
        return 0, GENESIS
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise InputError(
            f"{_shipped(path)} does not say what was sent.", "Remove it to send the whole log."
        ) from error
    for _ in range(number):
        line = file.readline(MAX_LINE)
    entry = parse(line) if number else None
    if number and (entry is None or entry["hash"] != head):
        raise _broken(number)
    return number, head


def _whole_lines(file: IO[bytes]) -> Iterator[bytes]:
    """The lines from here on; one that is being written is left for the next time."""
    while line := file.readline(MAX_LINE):
        if not line.endswith(b"\n"):
            file.seek(-len(line), os.SEEK_CUR)
            return
        yield line


def _frame(line: bytes, when: str) -> bytes:
    stamp = datetime.datetime.fromisoformat(when).astimezone(datetime.UTC)
    head = (
        f"<{PRIORITY}>1 {stamp:%Y-%m-%dT%H:%M:%S.%fZ} {_host()} medmoe-edge {os.getpid()} audit - "
    )
    message = head.encode("ascii") + line.rstrip(b"\n")
    return b"%d %s" % (len(message), message)


def _host() -> str:
    name = socket.gethostname().encode("ascii", errors="ignore").decode()
    return "".join(letter for letter in name if letter.isprintable() and letter != " ")[:255] or "-"


def _remember(path: Path, number: int, head: str) -> None:
    with atomic_file(_shipped(path)) as file:
        file.write(json.dumps({"number": number, "hash": head}).encode())


def _shipped(path: Path) -> Path:
    return path.with_name(f"{path.name}.shipped")


def _broken(number: int) -> DataError:
    return DataError(
        f"The audit log does not go on at entry {number} from what was sent before.",
        "See: medmoe-edge audit verify; keep the log as it is, and find out who could write it.",
    )
