"""`optimum-cli export medmoe CHECKPOINT OUT ...`: the verb `medmoe-edge export` with its options.

optimum imports every module of `optimum.commands.register` when it starts and reads
`REGISTER_COMMANDS` (optimum 2.3, `optimum/commands/optimum_cli.py`); what the export needs is
imported when it runs.
"""

from argparse import REMAINDER, ArgumentParser

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo
from optimum.commands.export.base import ExportCommand


class MedMoEExportCommand(BaseOptimumCLICommand):
    """Hands its arguments on, so that there is one description of the options."""

    COMMAND = CommandInfo(
        name="medmoe", help="Export a Med-MoE checkpoint to a bundle, calibrated and verified."
    )

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """The checkpoint, the bundle, and what `medmoe-edge export --help` lists."""
        parser.add_argument("checkpoint", help="A checkpoint folder, or nano.")
        parser.add_argument("output", help="The bundle's folder.")
        parser.add_argument(
            "options",
            nargs=REMAINDER,
            help="As of medmoe-edge export: --int8, --int4, --mixed BITS, --calibrate DATA, ...",
        )

    def run(self) -> None:
        """Exit with the verb's code: 0 done, 2 input, 3 model, 4 gate, 5 resource."""
        from medmoe_edge.cli import app

        assert self.args is not None
        asked = [self.args.checkpoint, "-o", self.args.output, *self.args.options]
        app(["export", *asked], prog_name="optimum-cli")


REGISTER_COMMANDS = [(MedMoEExportCommand, ExportCommand)]
