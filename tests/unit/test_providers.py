"""Which provider runs a bundle: chosen and said, never changed in silence."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import onnxruntime as ort
import pytest
import torch

from medmoe_edge.bundle.bundle import Bundle, TargetName, write_manifest
from medmoe_edge.checkpoint.reader import read_checkpoint
from medmoe_edge.config import Device
from medmoe_edge.errors import BundleError, MedMoEError, ResourceError
from medmoe_edge.runtimes.ort import runtime as ort_providers
from medmoe_edge.runtimes.ort.runtime import (
    CPU,
    CUDA,
    TARGETS,
    Choice,
    OrtRuntime,
    check_providers,
    choose_provider,
    preload_cuda,
)
from medmoe_edge.runtimes.torch.eager import BitsAndBytesRuntime, EagerRuntime, Kind

Make = Callable[..., Path]
BOTH = [CUDA, CPU]


@pytest.fixture
def cuda_bundle(tiny_bundle: Make, tmp_path: Path) -> Bundle:
    """A bundle that says it is made for CUDA, with graphs that any provider runs."""
    out = tmp_path / "cuda"
    shutil.copytree(tiny_bundle(), out)
    manifest = json.loads((out / "manifest.json").read_text())
    (out / "manifest.json").unlink()
    kept = {key: manifest[key] for key in manifest if key not in ("files", "seal")}
    write_manifest(out, {**kept, "target": {"name": "onnxruntime-cuda", "dtype": "fp16"}})
    return Bundle.open(out)


# --- the choice -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("requested", "available", "target", "device", "why"),
    [
        ("auto", [CPU], "onnxruntime", "cpu", "made for it"),
        ("auto", BOTH, "onnxruntime", "cpu", "made for it"),
        ("cpu", BOTH, "onnxruntime", "cpu", "asked for"),
        ("auto", BOTH, "onnxruntime-cuda", "cuda", "made for it"),
        ("cuda", BOTH, "onnxruntime-cuda", "cuda", "made for it"),
        ("cpu", BOTH, "onnxruntime-cuda", "cpu", "asked for"),
        ("cpu", [CPU], "onnxruntime-cuda", "cpu", "asked for"),
    ],
)
def test_a_provider_is_chosen_by_what_the_graphs_are_made_for(
    requested: Device, available: list[str], target: str, device: str, why: str
) -> None:
    choice = choose_provider(requested, available, target)
    assert choice.device == device
    assert why in choice.why
    assert choice.providers == (BOTH if device == "cuda" else [CPU])


@pytest.mark.parametrize(
    ("requested", "available", "target", "error", "what", "remedy"),
    [
        ("auto", [CPU], "onnxruntime-cuda", ResourceError, "no CUDA provider", r"\[gpu\]"),
        ("cuda", [CPU], "onnxruntime-cuda", ResourceError, "no CUDA provider", "doctor"),
        ("cuda", BOTH, "onnxruntime", BundleError, "made for the CPU", "onnxruntime-cuda"),
        ("auto", BOTH, "tensorrt", BundleError, "made for tensorrt", "onnxruntime-cuda"),
    ],
)
def test_what_cannot_run_is_told_with_its_remedy(
    requested: Device,
    available: list[str],
    target: str,
    error: type[MedMoEError],
    what: str,
    remedy: str,
) -> None:
    with pytest.raises(error, match=what) as caught:
        choose_provider(requested, available, target)
    assert remedy.replace("\\", "") in caught.value.remedy
    assert "\n" not in str(caught.value)


def test_every_target_of_onnx_runtime_is_known() -> None:
    assert set(TARGETS) == {name for name in get_args(TargetName) if "onnxruntime" in name}


def test_a_fall_back_is_an_error_or_allowed_and_said(caplog: pytest.LogCaptureFixture) -> None:
    asked = Choice("cuda", "the bundle's graphs are made for it")
    assert check_providers(asked, BOTH, allow_fallback=False) is asked
    with pytest.raises(ResourceError, match="would have run on the CPU") as caught:
        check_providers(asked, [CPU], allow_fallback=False)
    assert "doctor" in caught.value.remedy
    assert not caplog.records
    for choice in (
        check_providers(asked, [CPU], allow_fallback=True),
        choose_provider("auto", [CPU], "onnxruntime-cuda", allow_fallback=True),
    ):
        assert choice.device == "cpu"
        assert choice.why in caplog.text
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 2
    asked = Choice("cpu", "it was asked for")
    assert check_providers(asked, [CPU], allow_fallback=False) is asked


def test_what_the_library_prints_does_not_reach_stdout(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ort, "preload_dlls", lambda: print("Failed to load libcudart.so.13"))
    preload_cuda()
    assert capsys.readouterr() == ("", "")


# --- the runtime ------------------------------------------------------------------------------


def test_the_runtime_says_what_it_runs_on(
    tiny_bundle: Make, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "medmoe_edge"):
        runtime = OrtRuntime(Bundle.open(tiny_bundle()))
    assert "runs on cpu: the bundle's graphs are made for it" in caplog.text
    assert runtime.choice.device == "cpu"
    with pytest.raises(BundleError, match="made for the CPU"):
        OrtRuntime(Bundle.open(tiny_bundle()), device="cuda")


def test_a_bundle_for_cuda_is_not_run_on_the_cpu_in_silence(
    cuda_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ResourceError, match="no CUDA provider"):
        OrtRuntime(cuda_bundle)
    assert OrtRuntime(cuda_bundle, device="cpu").new_cache(4).capacity == 4
    # onnxruntime-gpu where CUDA's libraries do not load: a session of the CPU's provider alone
    monkeypatch.setattr(ort, "get_available_providers", lambda: BOTH)
    monkeypatch.setattr(ort_providers, "preload_cuda", lambda: None)
    opened: list[list[str]] = []

    def session(path: str, options: Any, providers: list[str], **_: int) -> ort.InferenceSession:
        opened.append(providers)
        return real(path, options, providers=[CPU])

    real = ort.InferenceSession
    monkeypatch.setattr(ort, "InferenceSession", session)
    runtime = OrtRuntime(cuda_bundle)
    with pytest.raises(ResourceError, match="could not load its CUDA provider"):
        runtime.new_cache(4)
    assert all(providers == BOTH for providers in opened)
    runtime = OrtRuntime(cuda_bundle, allow_fallback=True)
    cache = runtime.new_cache(4)
    assert runtime.choice == Choice("cpu", "CUDA's provider did not load")
    assert cache.buffers["key.0"].device_name() == "cpu"
    assert runtime.step(np.ones((2, 64), np.float32), cache).logits.shape == (320,)


# --- torch ------------------------------------------------------------------------------------


def test_a_cuda_that_torch_does_not_have_is_told(
    tiny_checkpoint: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    checkpoint = read_checkpoint(tiny_checkpoint())
    with pytest.raises(ResourceError, match=r"sees no CUDA device.*medmoe-edge doctor"):
        EagerRuntime(checkpoint, "cuda")
    with pytest.raises(ResourceError, match=r"sees no CUDA device.*medmoe-edge doctor"):
        BitsAndBytesRuntime(checkpoint, "nf4", "cuda")


def test_torch_computes_in_the_type_that_is_asked_for(tiny_checkpoint: Make) -> None:
    checkpoint = read_checkpoint(tiny_checkpoint("tiny-phi", top_k=2))
    exact, half = EagerRuntime(checkpoint), EagerRuntime(checkpoint, dtype=torch.bfloat16)
    for name, weight in half.model.named_parameters():
        assert weight.dtype == (torch.float32 if ".router." in name else torch.bfloat16)
    generator = np.random.default_rng(0)
    pixels = generator.normal(0, 1, (1, 3, 28, 28)).astype(np.float32)
    embeds = generator.normal(0, 0.2, (6, 64)).astype(np.float32)
    cache = half.new_cache(6)
    assert cache.keys.dtype == torch.bfloat16
    half.step(embeds[:5], cache)
    pairs = [
        (half.encode_image(pixels), exact.encode_image(pixels)),
        (half.step(embeds[5:], cache).logits, exact.step(embeds, exact.new_cache(6)).logits),
    ]
    for ours, theirs in pairs:
        assert ours.dtype == np.float32
        assert 0 < np.abs(ours - theirs).max() < 0.05 * np.abs(theirs).max()
    assert half.embed([3, 9]).dtype == np.float32


# --- on a GPU ---------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("preset", ["tiny", "tiny-phi"])
def test_torch_on_cuda_equals_the_cpu(tiny_checkpoint: Make, preset: str) -> None:
    checkpoint = read_checkpoint(tiny_checkpoint(preset))
    exact, ours = EagerRuntime(checkpoint), EagerRuntime(checkpoint, "cuda")
    embeds = np.random.default_rng(0).normal(0, 0.2, (6, 64)).astype(np.float32)
    cache = ours.new_cache(6)
    assert cache.keys.device.type == "cuda"
    ours.step(embeds[:5], cache)
    np.testing.assert_allclose(
        ours.step(embeds[5:], cache).logits,
        exact.step(embeds, exact.new_cache(6)).logits,
        rtol=1e-3,
        atol=1e-3,
    )


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_bitsandbytes_on_cuda_comes_near_the_cpu(tiny_checkpoint: Make, kind: Kind) -> None:
    checkpoint = read_checkpoint(tiny_checkpoint(dense=True))
    theirs, ours = (BitsAndBytesRuntime(checkpoint, kind, device) for device in ("cpu", "cuda"))
    assert all(weight.device.type == "cuda" for weight in ours.model.parameters())
    assert ours.bits_per_weight == theirs.bits_per_weight
    embeds = np.random.default_rng(0).normal(0, 0.2, (6, 64)).astype(np.float32)
    logits = [runtime.step(embeds, runtime.new_cache(6)).logits for runtime in (ours, theirs)]
    assert np.abs(logits[0] - logits[1]).max() < 0.02 * np.abs(logits[1]).max()
