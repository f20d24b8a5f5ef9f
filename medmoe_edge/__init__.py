"""Med-MoE at the bedside: questions about medical images, answered on a plain CPU.

    engine = medmoe_edge.load("nano")            # or a bundle's folder
    answer = engine.ask("scan.png", "Is there effusion?")
    print(answer.text, answer.confidence, answer.modality)

`load("modality-nano")` gives an engine that classifies and locates. `train`, `calibrate`,
`export_model`, `verify` and `evaluate` lead from data to a proven bundle; each takes an options
object. Errors are those of `medmoe_edge.errors`, and say what to do. For research only, not a
medical device.
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING

from medmoe_edge._version import __version__

# ONNX Runtime reads this when it is first imported. From 1.32 on it would else tell Microsoft of
# each session, and keep what it has to tell in the user's cache.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

__all__ = [
    "Answer",
    "CalibrateOptions",
    "Engine",
    "EvaluateOptions",
    "ExportOptions",
    "Image",
    "MedMoEError",
    "ModalityEngine",
    "VerifyOptions",
    "__version__",
    "calibrate",
    "evaluate",
    "export_model",
    "load",
    "train",
    "verify",
]

if TYPE_CHECKING:
    from medmoe_edge.api import calibrate, evaluate, export_model, load, train, verify
    from medmoe_edge.contrastive.engine import ModalityEngine
    from medmoe_edge.engine.answer import Answer
    from medmoe_edge.engine.engine import Engine
    from medmoe_edge.errors import MedMoEError
    from medmoe_edge.image.pixels import Image
    from medmoe_edge.pipeline import (
        CalibrateOptions,
        EvaluateOptions,
        ExportOptions,
        VerifyOptions,
    )
else:
    # Importing any submodule runs this file, and only asking should pay for ONNX Runtime.
    _MODULES = {
        "Answer": "engine.answer",
        "Engine": "engine.engine",
        "Image": "image.pixels",
        "MedMoEError": "errors",
        "ModalityEngine": "contrastive.engine",
        **dict.fromkeys(
            ("calibrate", "evaluate", "export_model", "load", "train", "verify"), "api"
        ),
        **dict.fromkeys(
            ("CalibrateOptions", "EvaluateOptions", "ExportOptions", "VerifyOptions"), "pipeline"
        ),
    }

    def __getattr__(name):
        if name in _MODULES:
            return getattr(import_module(f"medmoe_edge.{_MODULES[name]}"), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__():
        return __all__
