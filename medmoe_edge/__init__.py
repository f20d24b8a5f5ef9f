"""Med-MoE at the bedside: `medmoe_edge.load("nano").ask("scan.png", "Is there effusion?")`."""

from typing import TYPE_CHECKING

from medmoe_edge._version import __version__

__all__ = ["Answer", "Engine", "__version__", "load"]

if TYPE_CHECKING:
    from medmoe_edge.engine.answer import Answer
    from medmoe_edge.engine.engine import Engine, load
else:
    # Importing any submodule runs this file, and only asking should pay for ONNX Runtime.
    def __getattr__(name):
        if name in __all__:
            from medmoe_edge.engine import engine

            return getattr(engine, name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
