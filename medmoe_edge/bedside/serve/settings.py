"""What the service is told at its start: where it listens, who may ask, and how much."""

import ipaddress
import os
import re
import ssl
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from medmoe_edge.errors import InputError, is_host, unreadable
from medmoe_edge.image.pixels import MAX_PIXELS
from medmoe_edge.image.worker import Bounds

TOKEN = re.compile(r"[!-~]{16,1024}")  # visible ASCII, and long enough not to be guessed
NAME = re.compile(r"[\w.-]{1,64}", re.ASCII)  # of a token, as the audit log has it
ORIGIN = re.compile(r"https?://[\w.-]+(:\d+)?|https?://\[[0-9a-f:]+\](:\d+)?", re.ASCII)
IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address
MAX_TOKENS = 2**20  # bytes of their file


@dataclass(frozen=True)
class Limits:
    """What one request may take, and how many requests may wait while one is answered.

    `seconds` count from the end of the upload, which itself may take `upload_seconds`. Decoding one
    picture takes at most `decoding_seconds` of them, and `decoding_megabytes` of memory.
    """

    upload_bytes: int = 64 * 2**20
    pixels: int = MAX_PIXELS
    questions: int = 16
    new_tokens: int = 256
    seconds: float = 60.0
    upload_seconds: float = 30.0
    waiting: int = 8
    decoding_seconds: float = 4.5
    decoding_megabytes: int = 900

    @property
    def bounds(self) -> Bounds:
        """What decoding one picture may take."""
        return Bounds(self.pixels, self.decoding_megabytes, self.decoding_seconds)

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < (0 if name == "waiting" else 1):
                raise InputError(f"The limit {name} is {value}.", "Allow at least one.")


@dataclass(frozen=True)
class Settings:
    """Where the service listens and who may ask.

    `port` 0 is any free one. Whoever holds one of `tokens`, by name, may ask; without any, this
    machine alone. `proxy` names the addresses, with commas between them, of a proxy that ends TLS
    before this service and says in X-Forwarded-For who asks. Pages of `cors_origins` may ask too.

    Raises `InputError` for a service that others could reach and use without a token, or whose
    tokens and pictures would cross a network in plain text.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    tokens: Mapping[str, str] = field(default_factory=dict, repr=False)
    certificate: Path | None = None
    key: Path | None = None
    limits: Limits = Limits()
    proxy: str | None = None
    cors_origins: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not is_host(self.host):
            raise InputError(f"{self.host!r} is no host.", "Give the name or address of one.")
        if not self.tokens and not (self.is_local and self.proxy is None):
            where = "Through a proxy" if self.is_local else f"On {self.host}"
            raise InputError(
                f"{where} others can reach this service, and it has no token.",
                "Give --token-file, or listen on 127.0.0.1 without a proxy.",
            )
        if not self.is_local and self.certificate is None and self.proxy is None:
            raise InputError(
                f"On {self.host} pictures, answers and tokens would cross the network unencrypted.",
                "Give --tls-cert and --tls-key, or the --behind-proxy ADDRESS that ends TLS.",
            )
        for origin in self.cors_origins:
            if not ORIGIN.fullmatch(origin):
                raise InputError(
                    f"{origin!r} is not the origin of a page.", "Write it as https://host:port."
                )
        if (self.certificate is None) != (self.key is None):
            raise InputError("TLS needs a certificate and its key.", "Give both, or neither.")

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach it."""
        return is_loopback(self.host)

    @property
    def scheme(self) -> str:
        """`http` or `https`."""
        return "http" if self.certificate is None else "https"

    def check_tls(self) -> None:
        """Raise `InputError` unless the certificate and the key can be used together."""
        if self.certificate is None:
            return
        for file in (self.certificate, self.key):
            if file is not None and not file.exists():
                raise InputError(f"{file} does not exist.", "Check the path.")
        try:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(self.certificate, self.key, password=no_password)
        except (OSError, ValueError) as error:
            raise InputError(
                f"The certificate and the key cannot be used ({type(error).__name__}).",
                "Give PEM files that belong together, the key without a password.",
            ) from error


def read_tokens(path: Path) -> dict[str, str]:
    """The tokens by name in a file that nobody but its owner may read or write.

    Each line is a name and a token; a file of a single token needs no name. Lines that begin with
    `#` are comments.

    Raises `InputError` for a file of others' too, and for a token that is short or not ASCII.
    """
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            text = file.read(MAX_TOKENS).decode("ascii", errors="replace")
    except OSError as error:
        raise InputError(*unreadable(f"The token file {path}", error)) from error
    if os.name == "posix" and (stat.S_IMODE(status.st_mode) & 0o077):
        raise InputError(
            "Others than its owner may use the token file.",
            f"Make it yours alone: chmod 600 {path}",
        )
    lines = [line.split() for line in text.splitlines() if line.strip() and line[0] != "#"]
    if len(lines) == 1 and len(lines[0]) == 1:
        lines = [["token", *lines[0]]]
    for number, words in enumerate(lines, start=1):
        if len(words) != 2 or not NAME.fullmatch(words[0]):
            raise InputError(
                f"Entry {number} of the token file is not a name and a token.",
                "Write each on a line of its own: ward-3 TOKEN",
            )
    if not lines or not all(TOKEN.fullmatch(token) for _, token in lines):
        raise InputError(
            "The token file holds a token that is not 16 to 1024 visible ASCII characters.",
            "Make one: (umask 077; openssl rand -hex 32 > FILE)",
        )
    tokens = {words[0]: words[1] for words in lines}
    if len(tokens) < len(lines) or len(set(tokens.values())) < len(lines):
        raise InputError(
            "The token file has a name or a token twice.", "Give everyone a name and a token."
        )
    return tokens


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach what listens on a host."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def plain_address(address: IPAddress) -> IPAddress:
    """An address of IPv4 as such, also where IPv6 has mapped it: a port for both says it so."""
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return mapped or address


def no_password() -> str:
    """For `ssl`, which would else ask for the password of a key on the terminal."""
    raise ValueError("the key has a password")
