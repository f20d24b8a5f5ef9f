"""The vision towers as graphs: the numbers of torch, and no weight read before it is written."""

import dataclasses
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from graphs import changed, normal, relative
from torch import Tensor

from medmoe_edge._types import Floats
from medmoe_edge.checkpoint.reader import Checkpoint, read_checkpoint, write_checkpoint
from medmoe_edge.checkpoint.tensors import StoredTensor
from medmoe_edge.config import VisionConfig
from medmoe_edge.errors import CheckpointError
from medmoe_edge.export import vision
from medmoe_edge.export.builder import save_model
from medmoe_edge.export.half import SMALL, halve_weights
from medmoe_edge.export.vision import export_vision
from medmoe_edge.presets import PRESETS
from medmoe_edge.runtimes.ort.runtime import open_session, session_options
from medmoe_edge.runtimes.torch.eager import EagerRuntime
from medmoe_edge.training.initialise import random_tensors

Make = Callable[..., Path]
KINDS = ["clip", "siglip", "efficientnet-lite"]
BEHIND = ("vision.layers.1.", "vision.post_norm.")
UNREAD = {"clip": BEHIND, "siglip": BEHIND, "efficientnet-lite": ()}


@pytest.fixture(scope="module")
def towers(
    tiny_checkpoint: Make, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Checkpoint]:
    tower = VisionConfig(
        kind="efficientnet-lite",
        image_size=64,
        feature_size=320 + 4 * 112,
        pixel_mean=(127.0,) * 3,
        pixel_std=(128.0,) * 3,
        variant="lite0",
    )
    config = dataclasses.replace(PRESETS["tiny"], vision=tower)
    tensors = ((name, tensor * 5) for name, tensor in random_tensors(config, 0))
    folder = tmp_path_factory.mktemp("towers") / "efficientnet"
    write_checkpoint(folder, config, tensors)
    return {
        "clip": read_checkpoint(tiny_checkpoint()),
        "siglip": read_checkpoint(tiny_checkpoint("tiny-qwen")),
        "efficientnet-lite": read_checkpoint(folder),
    }


def image_tokens(model: ir.Model, folder: Path, pixels: Floats) -> Floats:
    save_model(model, folder, "vision")
    session = open_session(folder / "vision.onnx", session_options())
    (tokens,) = session.run(["image_tokens"], {"pixels": pixels})
    found: Floats = np.asarray(tokens, np.float32)[0]
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_the_tower_equals_torch(towers: dict[str, Checkpoint], tmp_path: Path, kind: str) -> None:
    checkpoint = towers[kind]
    side = checkpoint.config.vision.image_size
    pixels = normal(1, 3, side, side)
    expected = EagerRuntime(checkpoint).encode_image(pixels)
    assert expected.shape == (towers[kind].config.vision.image_tokens, 64)
    assert relative(expected, np.roll(expected, 1, axis=0)) > 0.01  # tokens differ by place
    exact = image_tokens(export_vision(checkpoint), tmp_path, pixels)
    assert relative(exact, expected) < 1e-4
    halved, modified = halve_weights(export_vision(checkpoint))
    assert modified
    assert relative(image_tokens(halved, tmp_path, pixels), expected) < 1e-3


def test_a_tower_gives_the_same_bytes_each_time(
    towers: dict[str, Checkpoint], tmp_path: Path
) -> None:
    for name in ("first", "second", "again"):
        if name == "again":
            vision._traced.cache_clear()
        (tmp_path / name).mkdir()
        save_model(export_vision(towers["clip"]), tmp_path / name, "vision")
    for file in ("vision.onnx", "vision.data"):
        content = (tmp_path / "first" / file).read_bytes()
        assert content == (tmp_path / "second" / file).read_bytes()
        assert content == (tmp_path / "again" / file).read_bytes()
        for place in (str(tmp_path), str(Path(vision.__file__).parents[1]), "site-packages"):
            assert place.encode() not in content  # nothing tells where it was made


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("halve", [False, True])
def test_each_weight_is_read_once_and_not_before_it_is_written(
    towers: dict[str, Checkpoint],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    halve: bool,
) -> None:
    reads: Counter[str] = Counter()
    read = StoredTensor.read

    def counted(self: StoredTensor) -> Tensor:
        reads[self.key] += 1
        return read(self)

    monkeypatch.setattr(StoredTensor, "read", counted)
    checkpoint = towers[kind]
    model = export_vision(checkpoint)
    if halve:
        halve_weights(model)
    assert not reads
    save_model(model, tmp_path, "vision")
    names = [name for name in checkpoint.names if name in model.graph.initializers]
    assert reads == Counter(checkpoint.stored[name].key for name in names)
    skipped = ("decoder.", *UNREAD[kind])  # CLIP's last layer feeds nothing
    assert names == [name for name in checkpoint.names if not name.startswith(skipped)]


@pytest.mark.parametrize("kind", KINDS)
def test_large_weights_are_halved_and_no_other(towers: dict[str, Checkpoint], kind: str) -> None:
    model, _ = halve_weights(export_vision(towers[kind]))
    for name, value in model.graph.initializers.items():
        assert value.const_value is not None
        large = value.const_value.size >= SMALL and value.dtype != ir.DataType.INT64
        assert (value.dtype == ir.DataType.FLOAT16) == large, name


@pytest.mark.parametrize("kind", KINDS)
def test_matrices_are_stored_as_matmul_reads_them(towers: dict[str, Checkpoint], kind: str) -> None:
    checkpoint = towers[kind]
    graph = export_vision(checkpoint).graph
    stored = graph.initializers["projector.2.weight"].const_value
    assert stored is not None
    plain = checkpoint.tensor("projector.2.weight").float().numpy()
    assert np.array_equal(stored.numpy(), plain.T)
    users = [use.node for value in graph.initializers.values() for use in value.uses()]
    assert "MatMul" in {node.op_type for node in users}
    assert "Transpose" not in {node.op_type for node in users}


@pytest.mark.parametrize("name", ["vision.class_embedding", "projector.0.weight"])
def test_a_weight_that_is_no_number_is_named(
    tiny_checkpoint: Make, tmp_path: Path, name: str
) -> None:
    def spoil(other: str, tensor: Tensor) -> Tensor:
        return torch.full_like(tensor, torch.inf) if other == name else tensor

    checkpoint = read_checkpoint(changed(tiny_checkpoint(), tmp_path / "spoilt", spoil))
    with pytest.raises(
        CheckpointError, match=f"The tensor {name} holds values that are NaN or infinite"
    ):
        save_model(export_vision(checkpoint), tmp_path, "vision")
