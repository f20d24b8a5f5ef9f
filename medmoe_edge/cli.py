"""The command line: each verb parses, calls one function of the library and prints.

Start-up is part of answering, so whatever only one verb needs is imported inside that verb.
"""

from medmoe_edge import (
    cli_ask,
    cli_audit,
    cli_batch,
    cli_build,
    cli_deploy,
    cli_listen,
    cli_make,
    cli_modality,
    cli_prove,
    cli_prove_bench,
    cli_serve,
)
from medmoe_edge.cli_app import app, main

__all__ = [
    "app",
    "cli_ask",
    "cli_audit",
    "cli_batch",
    "cli_build",
    "cli_deploy",
    "cli_listen",
    "cli_make",
    "cli_modality",
    "cli_prove",
    "cli_prove_bench",
    "cli_serve",
    "main",
]
