"""The command line: each verb parses, calls one function of the library and prints.

Start-up is part of answering, so whatever only one verb needs is imported inside that verb.
"""

from medmoe_edge import cli_ask, cli_build, cli_deploy, cli_make, cli_prove, cli_prove_bench
from medmoe_edge.cli_app import app, main

__all__ = [
    "app",
    "cli_ask",
    "cli_build",
    "cli_deploy",
    "cli_make",
    "cli_prove",
    "cli_prove_bench",
    "main",
]
