"""The doctor: what it reads from a machine, and what it makes of it."""

import dataclasses
import importlib.metadata
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from medmoe_edge.bundle.machine import cpu_features
from medmoe_edge.device.doctor import (
    PURPOSES,
    Diagnosis,
    Machine,
    Ort,
    diagnose,
    examine,
    find_extras,
    look_at_machine,
    look_at_onnxruntime,
    missing_base,
    needed_cuda,
    requirements,
)
from medmoe_edge.device.hardware import Gpu, Gpus, find_gpus, too_old
from medmoe_edge.export.jetson import Jetson, ask_power_mode
from medmoe_edge.runtimes.ort.runtime import int8_arithmetic

ROOT = Path(__file__).parents[2]
ORIN = Jetson("Jetson AGX Orin", "39.2", "MAXN", "7.2.2", "11.4.1")
RTX = Gpu("NVIDIA GeForce RTX 4090", 24 * 10**9, "8.9")
GPUS = Gpus("580.65.06", (13, 0), (RTX,))
MACHINE = Machine(
    system="Linux",
    cpu="A CPU",
    cores=4,
    features={"AVX2": True, "AMX int8": False},
    memory=16 * 10**9,
    disk_free=50 * 10**9,
    cache="/home/x/.cache",
    driver_loaded=False,
    gpus=None,
    jetson=None,
)
ORT = Ort("1.31.1", ("CPUExecutionProvider",), int8="exact")
CUDA = Ort("1.31.1", ("CUDAExecutionProvider", "CPUExecutionProvider"), cuda="13.0", int8="exact")


def versions(**there: str) -> Callable[[str], str | None]:
    """The base install and these packages besides; an empty version takes one away."""
    found = {
        **dict.fromkeys(requirements()[""], "1.0"),
        **{k.replace("_", "-"): v for k, v in there.items()},
    }
    return lambda package: found.get(package) or None


def told(machine: Machine = MACHINE, ort: Ort = ORT, **packages: str) -> list[tuple[str, str]]:
    return [(f.level, f.what) for f in diagnose(machine, ort, versions(**packages)).findings]


def changed(**values: Any) -> Machine:
    return dataclasses.replace(MACHINE, **values)


# --- packages -------------------------------------------------------------------------------------


def test_every_extra_of_the_project_has_a_purpose() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert set(PURPOSES) == set(project["optional-dependencies"]) - {"test", "docs", "dev"}


def test_requirements_are_read_from_our_metadata(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [
        "numpy>=2.0",
        "fhir.resources>=8.3; extra == 'listen'",
        "medmoe-edge[batch]; extra == 'ray'",
        "triton>=3.9; (sys_platform == 'linux') and extra == 'plugin'",
        "tzdata; sys_platform == 'win32'",
    ]
    lines += ['onnxruntime-gpu[cuda,cudnn]>=1.31; extra == "gpu"', 'ray[data]>=2; extra == "ray"']
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: lines)
    requirements.cache_clear()
    assert requirements() == {
        "": ("numpy", "tzdata"),
        "plugin": ("triton",),
        "listen": ("fhir.resources",),
        "gpu": ("onnxruntime-gpu",),
        "ray": ("ray",),
    }

    def unknown(name: str) -> list[str]:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", unknown)
    requirements.cache_clear()
    assert find_extras(versions()) == []
    assert [(level, "not installed" in what) for level, what in told()] == [("hint", True)]
    requirements.cache_clear()


def test_extras_by_state() -> None:
    found = {extra.name: extra for extra in find_extras(versions(triton="3.9", torch="2.13"))}
    assert found["plugin"].state == "installed"
    assert found["export"].state == "in part"
    assert found["export"].versions == {"torch": "2.13"}
    assert "onnx" in found["export"].missing
    assert found["rtx"].state == "missing"
    assert found["rtx"].command == "pip install 'medmoe-edge[rtx]'"


def test_the_base_may_be_served_by_the_gpu_build() -> None:
    assert missing_base(versions()) == []
    assert missing_base(versions(onnxruntime="")) == ["onnxruntime"]
    assert missing_base(versions(onnxruntime="", onnxruntime_gpu="1")) == []


@pytest.mark.parametrize(
    ("packages", "cuda", "needed"),
    [
        ({}, None, {}),
        ({}, "12.8", {}),  # a build for CUDA without its package: not ours to judge
        ({"onnxruntime_gpu": "1.31"}, "12.8", {"onnxruntime-gpu": 12}),
        ({"onnxruntime_gpu": "1.31"}, None, {}),
        ({"tensorrt_cu13": "11"}, None, {"tensorrt-cu13": 13}),
    ],
)
def test_cuda_that_packages_need(
    packages: dict[str, str], cuda: str | None, needed: dict[str, int]
) -> None:
    assert needed_cuda(versions(**packages), cuda) == needed


# --- devices --------------------------------------------------------------------------------------


def test_cpu_features() -> None:
    x86 = "model name : A\nflags\t\t: fpu avx2 avx512_vnni\nflags : amx_int8\n"
    assert cpu_features(x86) == {
        **{"AMX int8": False, "AVX-512 VNNI": True, "AVX-VNNI": False},
        **{"AVX-512": False, "AVX2": True},
    }
    assert cpu_features("Features : fp asimd asimddp\n") == {"i8mm": False, "dotprod": True}
    assert cpu_features("") == {}


class FakeNvmlError(Exception):
    pass


def nvml(**functions: Any) -> SimpleNamespace:
    """Like pynvml, with one RTX 4090 and a driver for CUDA 12.8."""

    def fail(*_: object) -> None:
        raise FakeNvmlError

    working: dict[str, Any] = {
        "nvmlInit": lambda: None,
        "nvmlShutdown": lambda: None,
        "nvmlDeviceGetCount": lambda: 1,
        "nvmlDeviceGetHandleByIndex": lambda index: index,
        "nvmlSystemGetCudaDriverVersion": lambda: 12080,
        "nvmlSystemGetDriverVersion": lambda: "570.1",
        "nvmlDeviceGetName": lambda _: "RTX",
        "nvmlDeviceGetCudaComputeCapability": lambda _: (8, 9),
        "nvmlDeviceGetMemoryInfo": lambda _: SimpleNamespace(total=24),
    }
    broken = {name: fail for name, value in functions.items() if value is None}
    return SimpleNamespace(**{**working, **broken}, NVMLError=FakeNvmlError)


def test_gpus_by_nvml() -> None:
    assert find_gpus(nvml()) == Gpus("570.1", (12, 8), (Gpu("RTX", 24, "8.9"),))
    assert find_gpus(nvml(nvmlInit=None)) is None
    assert find_gpus(nvml(nvmlDeviceGetMemoryInfo=None)) is None
    driver = nvml()
    driver.nvmlDeviceGetCount = lambda: 0  # as in a container that was given none
    assert find_gpus(driver) is None


def test_real_nvml_speaks_so() -> None:
    real = pytest.importorskip("pynvml")
    assert set(vars(nvml())) <= set(dir(real))


def test_a_driver_that_is_too_old() -> None:
    old = dataclasses.replace(GPUS, cuda=(12, 9))
    assert too_old(old, {"a": 13, "b": 12}) == ["a"]
    assert too_old(GPUS, {"a": 13, "b": 12}) == []


@pytest.mark.parametrize(
    ("output", "mode"), [("NV Power Mode: 15W\n0\n", "15W"), ("no such thing", None)]
)
def test_power_mode(monkeypatch: pytest.MonkeyPatch, output: str, mode: str | None) -> None:
    done = SimpleNamespace(stdout=output)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
    assert ask_power_mode() == mode


@pytest.mark.parametrize("error", [FileNotFoundError(), subprocess.TimeoutExpired("nvpmodel", 2)])
def test_no_power_mode(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(subprocess, "run", fail)
    assert ask_power_mode() is None


# --- findings -------------------------------------------------------------------------------------


def test_a_sound_machine_has_no_findings() -> None:
    diagnosis = diagnose(MACHINE, ORT, versions())
    assert diagnosis.findings == ()
    assert diagnosis.error() is None


def test_problems_end_with_an_error() -> None:
    for ort, packages in (
        (Ort(failure="ImportError"), versions()),
        (Ort("1.23.2", ("CPUExecutionProvider",)), versions()),
        (ORT, versions(tokenizers="", typer="")),
    ):
        diagnosis = diagnose(MACHINE, ort, packages)
        assert [finding.level for finding in diagnosis.findings] == ["problem"]
        error = diagnosis.error()
        assert error is not None
        assert error.exit_code == 5
        assert error.remedy == f"First: {diagnosis.findings[0].remedy}"
    assert "tokenizers typer" in diagnosis.findings[0].remedy


@pytest.mark.parametrize(
    ("machine", "ort", "packages", "level", "what"),
    [
        (MACHINE, ORT, {"onnxruntime_gpu": "1.0"}, "warning", "over each other"),
        (MACHINE, CUDA, {"onnxruntime_gpu": "0.9"}, "warning", "over each other"),
        (
            *(changed(gpus=dataclasses.replace(GPUS, cuda=(12, 8))), CUDA),
            *({"onnxruntime_gpu": "1.0"}, "warning", "runs CUDA 12, onnxruntime-gpu needs CUDA 13"),
        ),
        (
            *(changed(gpus=dataclasses.replace(GPUS, cuda=(12, 8))), CUDA),
            {"onnxruntime_gpu": "1.0", "onnxruntime_ep_nv_tensorrt_rtx_cu13": "0.5"},
            *("warning", "onnxruntime-ep-nv-tensorrt-rtx-cu13 needs CUDA 13"),
        ),
        (
            *(MACHINE, CUDA),
            {"onnxruntime_gpu": "1.0", "onnxruntime_ep_nv_tensorrt_rtx_cu13": "0.5"},
            *("warning", "replaces the onnxruntime"),
        ),
        (changed(gpus=GPUS), ORT, {}, "hint", "not used by ONNX Runtime"),
        (changed(driver_loaded=True), ORT, {}, "hint", "cannot be asked"),
        (
            *(changed(jetson=dataclasses.replace(ORIN, power_mode="15W")), ORT, {}),
            *("hint", "The power mode 15W limits the clocks."),
        ),
        (
            changed(jetson=ORIN),
            *(ORT, {"onnxruntime_ep_nv_tensorrt_rtx_cu13": "0.5"}),
            *("warning", "does not run on a Jetson"),
        ),
        (
            *(changed(jetson=dataclasses.replace(ORIN, jetpack="6.2")), ORT, {"tensorrt": "11.4"}),
            *("warning", "TensorRT 11.4 is not for Jetson AGX Orin with JetPack 6.2."),
        ),
        (
            *(changed(jetson=dataclasses.replace(ORIN, jetpack="5.1")), ORT, {}),
            *("warning", "JetPack 5.1: not supported."),
        ),
        (changed(jetson=Jetson("Orin", None, None)), ORT, {}, "hint", "does not say which JetPack"),
        (changed(features={"AVX2": False}), ORT, {}, "warning", "no AVX2: answers are exact, but"),
        (changed(features={"dotprod": False}), ORT, {}, "hint", "no dotprod: int8 is exact"),
        (
            MACHINE,
            dataclasses.replace(ORT, int8="saturating"),
            {},
            "hint",
            "products saturate",
        ),
        (changed(memory=10**9), ORT, {}, "warning", "little memory"),
        (changed(disk_free=10**9), ORT, {}, "warning", "little room"),
    ],
)
def test_what_does_not_meet(
    machine: Machine, ort: Ort, packages: dict[str, str], level: str, what: str
) -> None:
    assert any(level == own and what in text for own, text in told(machine, ort, **packages))


@pytest.mark.parametrize(
    ("machine", "ort", "packages"),
    [
        (changed(gpus=GPUS), CUDA, {"onnxruntime_gpu": "1.0"}),
        (changed(driver_loaded=True), ORT, {"nvidia_ml_py": "13"}),
        (changed(jetson=ORIN), ORT, {"tensorrt": "11.4.1"}),
        (changed(jetson=ORIN), ORT, {"tensorrt": "10.16.1"}),
        (changed(features={}), ORT, {}),
        (changed(features={"i8mm": False, "dotprod": True}), ORT, {}),
    ],
)
def test_what_meets(machine: Machine, ort: Ort, packages: dict[str, str]) -> None:
    assert told(machine, ort, **packages) == []


def test_the_fastest_mode_is_that_of_the_board() -> None:
    for mode, remedy in ((2, "sudo nvpmodel -m 2"), (None, "nvpmodel -p --verbose")):
        slow = dataclasses.replace(ORIN, power_mode="15W", fastest_mode=mode)
        (finding,) = diagnose(changed(jetson=slow), ORT, versions()).findings
        assert finding.remedy.endswith(remedy)


def test_facts_name_the_devices() -> None:
    def facts(machine: Machine) -> dict[str, str]:
        return dict(diagnose(machine, CUDA, versions()).facts)

    gpu = facts(changed(gpus=GPUS))
    assert gpu["GPU"] == "NVIDIA GeForce RTX 4090, 24.00 GB, compute capability 8.9"
    assert gpu["  driver"] == "580.65.06, CUDA 13.0"
    jetson = facts(changed(jetson=ORIN))
    assert jetson["Jetson"] == "Jetson AGX Orin"
    assert jetson["  software"] == "JetPack 7.2.2, L4T 39.2, TensorRT 11.4.1, power mode MAXN"
    assert jetson["  best path"].startswith("JetPack 7.2.2: on the GPU with TensorRT")
    told = diagnose(changed(jetson=ORIN), ORT, versions()).to_json()["jetson_path"]
    assert told["target"] == "tensorrt"
    assert any("--gpu orin" in command for command in told["commands"])
    assert diagnose(MACHINE, ORT, versions()).to_json()["jetson_path"] is None
    assert "GPU" not in jetson
    assert facts(MACHINE)["GPU"] == "none found"
    assert facts(MACHINE)["  int8"] == "exact, with AVX2"
    assert facts(changed(features={}))["  int8"] == "exact, with no known extension"


def test_this_machine() -> None:
    diagnosis = examine()
    assert isinstance(diagnosis, Diagnosis)
    assert diagnosis.error() is None
    assert diagnosis.ort.version == importlib.metadata.version("onnxruntime")
    assert "CPUExecutionProvider" in diagnosis.ort.providers
    assert diagnosis.ort.int8 == int8_arithmetic()
    assert diagnosis.machine.memory > 10**8
    told = diagnosis.to_json()
    assert set(told) >= {"machine", "onnxruntime", "base", "extras", "findings"}


def test_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container that runs as a number; and one whose home may not be looked into."""

    def none() -> Path:
        raise RuntimeError("Could not determine home directory.")

    def closed(path: Path) -> bool:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", none)
    assert look_at_machine().disk_free > 0
    monkeypatch.setattr(Path, "home", lambda: Path("/nobody/here"))
    monkeypatch.setattr(Path, "is_dir", closed)
    assert look_at_machine().cache == str(Path("/nobody/here/.cache"))


def test_a_broken_onnxruntime(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert look_at_onnxruntime() == Ort(failure="ModuleNotFoundError")
