"""What the tests' own images tell of their patients, and all that was told while they ran.

`conftest.no_word_of_patients` looks, after the last test, for the one in the other.
"""

import logging
from collections.abc import Iterator
from pathlib import Path

SECRETS = ("Doe^Jane", "MRN-4711", "20240506", "1.2.826.0.4711", "19700203", "House^Gregory")
KEPT = ("log", "*.log", "*.jsonl", "*.sqlite*")  # logs, audits and queues; not reports

bodies: list[str] = []  # of what the service answered: results, errors, metrics


class Log(logging.Handler):
    """Remembers what anyone logged, with tracebacks."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep it as it would be written."""
        self.lines.append(self.format(record))


def leaks(folder: Path, log: Log) -> Iterator[str]:
    """Where a secret was told: in the files under a folder, in the log, or by the service."""
    told = {"the log": "\n".join(log.lines), "the service": "\n".join(bodies)}
    for pattern in KEPT:
        for path in folder.rglob(pattern):
            if path.is_file():
                told[str(path)] = path.read_bytes().decode("latin-1")
    for place, text in told.items():
        yield from (f"{secret} in {place}" for secret in SECRETS if secret in text)
