"""The command line: each verb parses, calls one function of the library and prints.

Start-up is part of answering, so whatever only one verb needs is imported inside that verb.
Importing a module registers its verbs.
"""

from medmoe_edge.cli import ask, bedside, bench, contrastive, device, export, train, verify
from medmoe_edge.cli.common import app, main

__all__ = [
    "app",
    "ask",
    "bedside",
    "bench",
    "contrastive",
    "device",
    "export",
    "main",
    "train",
    "verify",
]
