"""GPUs are found by the names people type, and refused with the way out."""

import pytest

from medmoe_edge.errors import InputError
from medmoe_edge.export.gpus import GPUS, Library, find_gpu


@pytest.mark.parametrize(
    ("name", "library", "sm"),
    [
        ("rtx-4090", "tensorrt-rtx", "sm89"),
        ("RTX 3090", "tensorrt-rtx", "sm86"),
        ("rtx_5080", "tensorrt-rtx", "sm120"),
        ("dgx-spark", "tensorrt-rtx", "sm121"),
        ("sm86", "tensorrt-rtx", "sm86"),
        ("orin-nano-8g", "tensorrt", "sm87"),
        ("thor", "tensorrt", "sm110"),
        ("H100", "tensorrt", "sm90"),
    ],
)
def test_a_name_gives_the_compute_capability(name: str, library: Library, sm: str) -> None:
    assert find_gpu(name, library).sm == sm


def test_an_unknown_name_gets_the_nearest_and_all() -> None:
    with pytest.raises(InputError, match="no GPU 'rtx-4900'") as caught:
        find_gpu("rtx-4900", "tensorrt-rtx")
    assert "Did you mean 'rtx-4090'?" in caught.value.remedy
    assert all(name in caught.value.remedy for name in GPUS)


@pytest.mark.parametrize(
    ("name", "wrong", "right"),
    [("orin", "tensorrt-rtx", "tensorrt"), ("rtx-4090", "tensorrt", "tensorrt-rtx")],
)
def test_the_wrong_library_names_the_right_one(name: str, wrong: Library, right: Library) -> None:
    with pytest.raises(InputError, match=f"does not serve {name}") as caught:
        find_gpu(name, wrong)
    assert f"--target {right}," in caught.value.remedy


@pytest.mark.parametrize("name", ["t4", "rtx-2080", "sm75"])
@pytest.mark.parametrize("library", ["tensorrt-rtx", "tensorrt"])
def test_turing_is_refused(name: str, library: Library) -> None:
    with pytest.raises(InputError, match="Turing"):
        find_gpu(name, library)


def test_what_the_library_for_rtx_serves_is_what_it_says() -> None:
    pytest.importorskip("onnxruntime_ep_nv_tensorrt_rtx")
    trt = pytest.importorskip("tensorrt_rtx_bindings")
    served = {gpu.sm.upper() for gpu in GPUS.values() if gpu.library == "tensorrt-rtx"}
    assert served == {name for name in dir(trt.ComputeCapability) if name.startswith("SM")} - {
        "SM75"
    }
