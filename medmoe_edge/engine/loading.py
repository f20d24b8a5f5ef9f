"""From a name or a folder to a runtime, a tokenizer, and what was proven of the model and where."""

import contextlib
import json
import logging
import os
import platform
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple, Self, get_args

from medmoe_edge.atomic import atomic_file
from medmoe_edge.bundle.bundle import DEFAULT, MANIFEST, AnyBundle, Bundle, Status, status_of
from medmoe_edge.bundle.machine import Machine, available_memory, cpu_flags, cpu_name
from medmoe_edge.bundle.trust import check_checkpoint
from medmoe_edge.config import Confidence, Device, RuntimeName
from medmoe_edge.embedded import bundle_path, checkpoint_path
from medmoe_edge.errors import (
    BundleError,
    CheckpointError,
    InputError,
    MedMoEError,
    ModelError,
    Notice,
    ResourceError,
    needs,
    shown_bytes,
)
from medmoe_edge.prompt import Tokenizer
from medmoe_edge.runtimes.base import Runtime
from medmoe_edge.runtimes.costs import (
    PROCESS,
    Asked,
    held_experts,
    memory_run,
)
from medmoe_edge.runtimes.paging.pager import Budget, ExpertPager, least_budget
from medmoe_edge.runtimes.paging.prediction import budget_bytes

REFERENCE = "reference"  # a checkpoint, which bundles are verified against


@dataclass(frozen=True)
class Proven:
    """What is known of a bundle's fidelity, and where it was found out.

    `status` is "passed", "not decided" (on too few questions), "failed" or "not measured";
    `machine` is None where it was not recorded.
    `here`: it holds on this machine.
    """

    status: Status
    machine: Machine | None
    here: bool

    @property
    def elsewhere(self) -> bool:
        """Whether it did not fail, but was verified on another kind of machine."""
        return self.status in ("passed", "not decided") and not self.here

    @property
    def hint(self) -> str:
        """One line for people about a proof that was made elsewhere; else empty."""
        if not self.elsewhere:
            return ""
        where = f"on {self.machine}" if self.machine else "on a machine that was not recorded"
        return f"Verified elsewhere: {where}. To prove it here: medmoe-edge verify --quick"

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        machine = self.machine.to_json() if self.machine else None
        return {"here": self.here, "machine": machine}


def describe(name: str, sha256: str, known: Proven | None, runtime: str) -> dict[str, Any]:
    """What an answer says of the model: `verification` is "reference" of a checkpoint, and then
    `verified` is None.
    """
    return {
        "name": name,
        "sha256": sha256,
        "verification": known.status if known else REFERENCE,
        "verified": known.to_json() if known else None,
        "runtime": runtime,
    }


@cache
def this_machine() -> Machine:
    """The machine that runs this; takes some milliseconds, once."""
    import onnxruntime

    from medmoe_edge.runtimes.ort.runtime import int8_arithmetic

    return Machine(
        cpu_name(), platform.machine(), cpu_flags(), onnxruntime.__version__, int8_arithmetic()
    )


def proven(bundle: AnyBundle[Any]) -> Proven:
    """What this kind of machine found last of a bundle, else what its manifest says."""
    here = this_machine()
    if local := remembered(bundle):
        machine = Machine.from_json(local["machine"])
        if machine.computes_like(here):
            return Proven(status_of(local), machine, here=True)
    there = bundle.verified_on
    return Proven(bundle.proof, there, here=there is not None and there.computes_like(here))


def remember(bundle: AnyBundle[Any], record: dict[str, Any]) -> None:
    """Keep a record (`passed`, `machine` and whatever else) of this bundle in the user's cache.

    Where that cannot be written, nothing is kept, and a warning says so.
    """
    path = _path(bundle)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as file:
            file.write(json.dumps(record).encode())
    except OSError as error:
        logger.warning(
            "What was found of %s on this machine cannot be kept in %s (%s): asking it will not "
            "know of it. Make that folder writable, and verify again.",
            *(bundle.name, path.parent, error.strerror or error),
        )


def remembered(bundle: AnyBundle[Any]) -> dict[str, Any] | None:
    """What `remember` kept of this very bundle; None where nothing was, or it is damaged."""
    try:
        record = json.loads(_path(bundle).read_bytes())
        sound = isinstance(record["passed"], bool | None) and bool(
            Machine.from_json(record["machine"])
        )
    except (OSError, ValueError, LookupError, TypeError, RecursionError, MedMoEError):
        return None
    return dict(record) if sound else None


def _path(bundle: AnyBundle[Any]) -> Path:
    import platformdirs

    return platformdirs.user_cache_path("medmoe-edge") / "verified" / f"{bundle.sha256}.json"


LARGE = 2**28  # bytes of experts, above which each is a session: they load in parallel
ALL = "100%"  # a budget for every expert
AUTO = "auto"  # a budget that free memory decides
# Of the memory that is forecast, which is then looked for: forecasts were within 8% of what was
# measured (tests/unit/test_plan_figures.py).
SPARE = 1.1


logger = logging.getLogger(__name__)
# What a budget of "auto" came to: the command line shows this one from INFO on, in one line.
chosen_memory = logging.getLogger("medmoe_edge.engine.memory")


@dataclass(frozen=True)
class MemoryChoice:
    """What a memory budget of "auto" came to; bytes.

    `budget` is of the experts, None where all of them are resident. `free` memory was found, and
    `needed` is what the process is expected to add to what it holds, a tenth to spare.
    """

    budget: int | None
    free: int
    needed: int

    def __str__(self) -> str:
        """One line for people."""
        found = f"Of {shown_bytes(self.free)} free memory"
        if self.budget is None:
            return f"{found} the model takes {shown_bytes(self.needed)}: all experts are resident."
        return f"{found} experts may take {shown_bytes(self.budget)}: they are paged."

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        mode = "resident" if self.budget is None else "paged"
        return {"mode": mode, "budget": self.budget, "free": self.free, "needed": self.needed}


class Loaded(NamedTuple):
    """What an engine is made of; `proven` is None of a checkpoint.

    `warnings` are what every answer of the model is to say. Where the bundle says it, `thresholds`
    tell by its code how likely a refusal must be to count, and `fitted` how often it is right.
    `memory` is what a budget of "auto" came to.
    """

    runtime: Runtime
    tokenizer: Tokenizer
    name: str
    sha256: str
    proven: Proven | None
    warnings: tuple[Notice, ...] = ()
    thresholds: Mapping[str, float] | None = None
    fitted: Confidence | None = None
    memory: MemoryChoice | None = None


class Paging(NamedTuple):
    """Whether experts are paged, and how; see `engine.load`."""

    budget: Budget | None = None
    drop_pages: bool = False


def check_place(runtime: str, device: str) -> None:
    """Raise `InputError` for a name that means nothing, and would pass for one that does."""
    known = {"runtime": (runtime, get_args(RuntimeName)), "device": (device, get_args(Device))}
    for option, (value, names) in known.items():
        if not isinstance(value, str) or value not in names:
            raise InputError(f"{option} is {value!r}.", f"Use one of: {', '.join(names)}.")


def open_model(
    model: str | os.PathLike[str],
    runtime: RuntimeName,
    device: Device,
    paging: Paging,
    *,
    keeps_prefixes: bool,
) -> Loaded:
    """Open what `engine.load` was given, as it says."""
    check_place(runtime, device)
    given: Any = paging.budget  # whatever the type says
    if not isinstance(given, Budget | None):
        kind = type(given).__name__
        raise InputError(f"memory_budget cannot be {kind}.", "Give 1500MB, 50%, auto or bytes.")
    if paging.drop_pages and paging.budget is None:
        raise InputError(
            "Pages are dropped of experts that are paged, and there is no memory budget.",
            "Give a memory budget, or leave the pages alone.",
        )
    model = os.fspath(model)
    folder = checkpoint_path(model) if runtime == "torch" else bundle_path(model)
    is_bundle = (folder / MANIFEST).exists()
    if is_bundle or runtime in ("onnxruntime", "tensorrt"):
        memory = None
        budget = paging.budget
        if budget is not None:
            unchecked = Bundle.open(folder, verify=False)
            if is_auto(budget):
                memory = _choose_memory(unchecked, runtime, device)
                paging = Paging(memory.budget, paging.drop_pages and memory.budget is not None)
            else:
                _check_budget(unchecked, budget)
        bundle = Bundle.open(folder)
        if keeps_prefixes and bundle.target.is_engine:
            raise InputError(
                f"{bundle.name} is made for {bundle.target}, whose KV cache is not kept in files.",
                "Leave the prefix cache out, or give the portable bundle that it was made from.",
            )
        return _open_bundle(bundle, runtime, device, paging)._replace(memory=memory)
    if paging.budget is not None:
        raise _not_paged(f"{folder.name} is a checkpoint")
    check_checkpoint(folder)
    return _open_checkpoint(folder, device)


def is_auto(budget: Budget) -> bool:
    """Whether free memory is to decide."""
    return isinstance(budget, str) and budget.strip().lower() == AUTO


def _choose_memory(bundle: Bundle, runtime: RuntimeName, device: Device) -> MemoryChoice:
    """What free memory allows on this CPU; logged in one line."""
    if bundle.target.name != DEFAULT or device == "cuda" or runtime == "torch":
        raise InputError(
            "A memory budget of auto looks at this machine's memory, for ONNX Runtime on its CPU.",
            "Give bytes or a share, as 1500MB or 50%, or leave the budget out.",
        )
    free = available_memory()
    if free is None:
        raise ResourceError(
            "This system does not tell how much memory is free.",
            "Give a memory budget in bytes or as a share: 1500MB, 50%.",
        )
    choice = choose_memory(bundle, free)
    chosen_memory.info("%s", choice)
    return choice


def choose_memory(bundle: Bundle, free: int) -> MemoryChoice:
    """Have all experts resident where that fits, else as many as do.

    Args:
        bundle: For ONNX Runtime's CPU.
        free: Bytes that the process may take beside what it holds already.

    Returns:
        The choice. With a budget, it is the largest that fits.

    Raises:
        ResourceError: Not even one layer's experts would fit beside the rest; it says how many
            bytes would do.
    """
    precision = bundle.manifest["quantisation"]["precision"]
    asked = Asked.of_bundle(bundle)
    held = held_experts(asked, precision)
    rest = memory_run(asked, "cpu", precision) - PROCESS["cpu"] - held
    rest, whole = round(SPARE * rest), round(SPARE * (rest + held))
    if whole <= free:
        return MemoryChoice(None, free, whole)
    if bundle.config.moe is None or not bundle.manifest.get("paging"):
        raise _no_room(bundle, whole, free)
    from medmoe_edge.runtimes.ort.paged import OrtExpertStore

    store = OrtExpertStore(bundle)
    least = least_budget(store, bundle.config.moe.top_k)
    budget = min(free - rest, sum(store.sizes.values()) + store.scratch)
    if budget < least:
        raise _no_room(bundle, min(rest + least, whole), free)
    return MemoryChoice(budget, free, rest + budget)


def _no_room(bundle: Bundle, least: int, free: int) -> ResourceError:
    return ResourceError(
        f"{bundle.name} takes at least {least:,} bytes of memory, and {free:,} are free.",
        f"Free {shown_bytes(least - free)}, or export the model smaller: --int4.",
    )


def _check_budget(bundle: Bundle, budget: Budget) -> None:
    """Refuse what can never work before gigabytes are read; each runtime knows the exact least."""
    extents = bundle.manifest.get("experts", {}).items()
    sizes = [size for owner, (_, size) in extents if ".experts." in owner]
    if not sizes or isinstance(budget, ExpertPager):
        return
    given = budget if isinstance(budget, int) else budget_bytes(budget, sum(sizes))
    if given < max(sizes):
        raise InputError(
            f"A memory budget of {given:,} bytes is too small for this model.",
            f"One expert alone takes {max(sizes):,} bytes: allow several of them.",
        )


def _open_bundle(bundle: Bundle, runtime: RuntimeName, device: Device, paging: Paging) -> Loaded:
    known, name = proven(bundle), bundle.name
    warnings = (*warnings_of(name, known), *bundle.warnings)
    tokenizer = Tokenizer.from_file(bundle.path("tokenizer.json"))
    loaded = _runtime_of(bundle, runtime, device, paging)
    logger.info("%s runs on %s.", name, loaded.name)
    return Loaded(
        *(loaded, tokenizer, name, bundle.sha256, known, warnings),
        thresholds=bundle.refusals,
        fitted=bundle.confidence,
    )


def warnings_of(name: str, known: Proven | None) -> tuple[Notice, ...]:
    """What a model's proof has every answer say; it is logged too."""
    if known is None or known.status != "failed":
        return ()
    what = f"{name} failed its verification: it may answer otherwise than its checkpoint."
    logger.warning("%s", what)
    return (Notice("verification_failed", what),)


def _runtime_of(bundle: Bundle, runtime: RuntimeName, device: Device, paging: Paging) -> Runtime:
    target, is_engine = bundle.target, bundle.target.is_engine
    if is_engine != (runtime == "tensorrt") and runtime != "auto":
        raise ModelError(
            f"{bundle.name} is made for {target}, not for {runtime}.",
            "Leave --runtime out, or export the model for it: medmoe-edge export --help",
        )
    if is_engine and device == "cpu":
        raise ModelError(
            f"{bundle.name} holds engines for a GPU ({target}).",
            "On the CPU, use the portable bundle that it was made from.",
        )
    if target.paged and runtime != "torch":
        return _slots_runtime(bundle, device, paging)
    if paging.budget is not None:
        return _paged_runtime(bundle, runtime, device, paging.budget, paging.drop_pages)
    if runtime == "torch":
        return _torch_runtime(bundle, device)
    if not is_engine:
        return _ort_runtime(bundle, device)
    from medmoe_edge.runtimes.tensorrt.runtime import TensorRTRuntime

    return TensorRTRuntime(bundle)


def _ort_runtime(bundle: Bundle, device: Device) -> Runtime:
    paging = bundle.manifest.get("paging") or {}
    size = sum(size for _, size in bundle.manifest.get("experts", {}).values())
    if device != "cuda" and "graphs" in paging and size >= LARGE:
        from medmoe_edge.runtimes.ort.paged import PagedOrtRuntime

        return PagedOrtRuntime(bundle, None, check="never")  # the whole file has just been checked
    from medmoe_edge.runtimes.ort.runtime import OrtRuntime

    return OrtRuntime(bundle, device=device)


def _paged_runtime(
    bundle: Bundle, runtime: RuntimeName, device: Device, budget: Budget, drop_pages: bool
) -> Runtime:
    if runtime == "torch":
        return _paged_torch_runtime(bundle, device, budget, drop_pages)
    if bundle.target.name != DEFAULT:
        raise _not_paged(f"{bundle.name} is made for {bundle.target} with all experts in memory")
    if device == "cuda":
        raise _not_paged("This was asked for another device")
    from medmoe_edge.runtimes.ort.paged import PagedOrtRuntime

    return PagedOrtRuntime(bundle, budget, drop_pages=drop_pages)


def _not_paged(why: str) -> InputError:
    return InputError(
        f"{why}; experts are paged in portable bundles, by ONNX Runtime on the CPU or by torch, "
        "and in those for a GPU that were made for it.",
        "Leave the memory budget out, give a portable bundle, or export for a GPU with --paged.",
    )


def _slots_runtime(bundle: Bundle, device: Device, paging: Paging) -> Runtime:
    budget = ALL if paging.budget is None else paging.budget
    if isinstance(budget, ExpertPager):
        raise _not_shared("a GPU")
    if bundle.target.is_engine:
        from medmoe_edge.runtimes.tensorrt.runtime import PagedTensorRTRuntime

        return PagedTensorRTRuntime(bundle, budget, drop_pages=paging.drop_pages)
    from medmoe_edge.runtimes.ort.paged import SlotOrtRuntime

    return SlotOrtRuntime(bundle, budget, device=device, drop_pages=paging.drop_pages)


def _not_shared(where: str) -> InputError:
    return InputError(
        f"Engines on {where} cannot share one memory budget.", "Give each a budget of its own."
    )


def _paged_torch_runtime(
    bundle: Bundle, device: Device, budget: Budget, drop_pages: bool
) -> Runtime:
    if isinstance(budget, ExpertPager):
        raise _not_shared("torch")
    with needs("export"):
        from medmoe_edge.runtimes.torch.paged import PagedTorchRuntime
    where: Literal["cpu", "cuda"] = "cuda" if device == "cuda" else "cpu"
    return PagedTorchRuntime(bundle, budget, where, drop_pages=drop_pages)


def _torch_runtime(bundle: Bundle, device: Device) -> Runtime:
    with needs("export"):
        from medmoe_edge.runtimes.torch.bundle import TorchBundleRuntime
    return TorchBundleRuntime(bundle, "cuda" if device == "cuda" else "cpu")


def _open_checkpoint(folder: Path, device: Device) -> Loaded:
    if not (folder / "config.json").exists():  # found out before torch is asked for
        raise ModelError(
            f"{folder} is neither a bundle nor a checkpoint.",
            "Give a bundle, made by: medmoe-edge export; or a folder with config.json and weights.",
        )
    with needs("export"):
        from medmoe_edge.checkpoint.reader import read_checkpoint
        from medmoe_edge.runtimes.torch.eager import EagerRuntime
    checkpoint = read_checkpoint(folder)
    tokenizer = checkpoint.tokenizer.tokenizer
    runtime = EagerRuntime(checkpoint, "cuda" if device == "cuda" else "cpu")
    name, sha256 = folder.resolve().name, checkpoint.sha256()
    return Loaded(runtime, tokenizer, name, sha256, None, checkpoint.warnings)


class OneAtATime:
    """A loaded model that computes one request at a time, and can be closed.

    Methods may be called from any thread. What computes is one model with one cache, so that
    requests wait for each other; for more at a time, load more engines. It is a context manager.
    """

    name: str
    proven: Proven | None  # of a checkpoint: None
    verification: str
    runtime: object

    def __init__(self) -> None:
        self._turn = threading.Lock()
        self._owner: int | None = None
        self._closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: object, _trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give the model's memory back, after the request at hand; a second time does nothing."""
        if self._closed:
            return
        with self.one_at_a_time(closing=True):
            if not self._closed:  # by another thread meanwhile
                self._closed = True
                self._release()

    def _release(self) -> None:
        del self.runtime

    def not_finite(self) -> ModelError:
        """The error of a model that computed NaN or infinity: what follows would be no answer."""
        what = f"{self.name} computed values that are NaN or infinite."
        if self.proven is None:
            return CheckpointError(what, "Its training diverged: use an earlier checkpoint.")
        return BundleError(
            what, "Export the model again, and verify it: medmoe-edge verify BUNDLE."
        )

    def __repr__(self) -> str:
        run_by = "closed" if self._closed else getattr(self.runtime, "name", "unknown runtime")
        return f"<{type(self).__name__} {self.name}, {run_by}, verification {self.verification}>"

    @contextlib.contextmanager
    def one_at_a_time(self, *, closing: bool = False) -> Iterator[None]:
        """Wait for one's turn.

        Raises `InputError` where the engine is closed, and where this thread itself is in the
        midst of a stream, for which it would wait forever.
        """
        if self._owner == threading.get_ident():
            raise InputError(
                "An answer is being streamed by this thread.", "Read it to its end, or close it."
            )
        with self._turn:
            if self._closed and not closing:
                raise InputError(f"The engine of {self.name} is closed.", "Load the model again.")
            self._owner = threading.get_ident()
            try:
                yield
            finally:
                self._owner = None
