"""The command line: each verb parses, calls one function of the library and prints.

Start-up is part of answering, so whatever only one verb needs is imported inside that verb.
Importing a verb's module registers it.
"""

from medmoe_edge.cli import (
    ask,
    audit,
    batch,
    bench,
    contrastive,
    device,
    export,
    listen,
    make,
    serve,
    verify,
)
from medmoe_edge.cli.common import app, main

__all__ = [
    "app",
    "ask",
    "audit",
    "batch",
    "bench",
    "contrastive",
    "device",
    "export",
    "listen",
    "main",
    "make",
    "serve",
    "verify",
]
