"""From a name or a folder to a runtime of MedMoE and what is known of the model."""

import logging
import os
from pathlib import Path
from typing import Literal, NamedTuple

from medmoe_edge.bundle.bundle import MANIFEST, model_kind
from medmoe_edge.bundle.contrastive import ModalityBundle
from medmoe_edge.config_contrastive import ModalityConfig, Scores, read_scores
from medmoe_edge.contrastive.text import ModalityTokenizer
from medmoe_edge.embedded import bundle_path, checkpoint_path
from medmoe_edge.engine.proof import Proven, proven
from medmoe_edge.errors import MissingDependencyError, ModelError
from medmoe_edge.runtimes.contrastive import ModalityRuntime

RuntimeName = Literal["auto", "onnxruntime", "torch"]

logger = logging.getLogger(__name__)


class Loaded(NamedTuple):
    """What an engine is made of; `proven` is None of a checkpoint."""

    runtime: ModalityRuntime
    name: str
    sha256: str
    proven: Proven | None
    scores: Scores


def open_modality(model: str | os.PathLike[str], runtime: RuntimeName) -> Loaded:
    """Open what `modality_engine.load_modality` was given, as it says."""
    model = os.fspath(model)
    folder = checkpoint_path(model) if runtime == "torch" else bundle_path(model)
    if (folder / MANIFEST).exists():
        return _open_bundle(ModalityBundle.open(folder), runtime)
    if model_kind(folder) != ModalityBundle.kind:
        raise ModelError(
            f"{folder} is no bundle or checkpoint of a {ModalityBundle.kind} model.",
            "Use modality-nano, or a model that was trained with: train --model modality-moe",
        )
    if runtime == "onnxruntime":
        raise ModelError(
            f"{folder} is a checkpoint, which ONNX Runtime does not run.",
            "Export it first: medmoe-edge export CHECKPOINT",
        )
    return open_checkpoint(folder)


def open_bundle(bundle: ModalityBundle) -> ModalityRuntime:
    """The runtime of a bundle; raises `BundleError` for one that holds engines."""
    bundle.check_portable()
    from medmoe_edge.runtimes.ort.contrastive import ModalityOrtRuntime

    reader = _reader(bundle.path("tokenizer.json"), bundle.config)
    return ModalityOrtRuntime(bundle, reader)


def open_checkpoint(folder: Path) -> Loaded:
    """A checkpoint on torch; raises `ModelError` and `MissingDependencyError`."""
    try:
        from medmoe_edge.checkpoint.contrastive import modality_sha256, read_modality_checkpoint
        from medmoe_edge.runtimes.torch.contrastive import ModalityTorchRuntime
    except ModuleNotFoundError as error:
        raise MissingDependencyError(error.name or "torch", "export") from error
    model = read_modality_checkpoint(folder)
    runtime = ModalityTorchRuntime(model, _reader(folder / "tokenizer.json", model.config))
    name, sha256 = folder.resolve().name, modality_sha256(folder)
    return Loaded(runtime, name, sha256, None, read_scores(folder))


def _open_bundle(bundle: ModalityBundle, runtime: RuntimeName) -> Loaded:
    if runtime == "torch":
        raise ModelError(
            f"{bundle.folder} is a bundle, and torch runs checkpoints.",
            "Leave --runtime out, or give the checkpoint.",
        )
    known = proven(bundle)
    if known.status == "failed":
        logger.warning(
            "%s failed its verification: it may answer otherwise than its checkpoint.", bundle.name
        )
    loaded = open_bundle(bundle)
    return Loaded(loaded, bundle.name, bundle.sha256, known, bundle.scores)


def _reader(path: Path, config: ModalityConfig) -> ModalityTokenizer:
    return ModalityTokenizer.from_file(path, config.text)
