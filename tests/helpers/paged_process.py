"""Asks a bundle's decoder with its experts resident or paged; prints what that took, as JSON.

    python tests/helpers/paged_process.py BUNDLE resident
    python tests/helpers/paged_process.py BUNDLE 50%

A process of its own, so that its memory is the runtime's.
"""

import hashlib
import json
import sys
from pathlib import Path

import numpy as np

from medmoe_edge.bundle.bundle import Bundle
from medmoe_edge.runtimes.base import Runtime
from medmoe_edge.runtimes.ort.paged import PagedOrtRuntime
from medmoe_edge.runtimes.ort.runtime import OrtRuntime


def main(folder: Path, budget: str) -> None:
    """A prefill of 60 tokens and 20 steps."""
    bundle = Bundle.open(folder, verify=False)
    runtime: Runtime = (
        OrtRuntime(bundle) if budget == "resident" else PagedOrtRuntime(bundle, budget)
    )
    size = bundle.config.decoder.hidden_size
    generator = np.random.default_rng(0)
    cache = runtime.new_cache(80)
    digest = hashlib.sha256()
    for length in (60, *[1] * 20):
        step = runtime.step(generator.standard_normal((length, size), np.float32), cache)
        digest.update(step.logits.tobytes() + step.router_logits.tobytes())
    told = {"answer": digest.hexdigest(), **memory()}
    if isinstance(runtime, PagedOrtRuntime):
        told["paging"] = runtime.paging()
    print(json.dumps(told))


def memory() -> dict[str, int]:
    """Bytes resident now and at the peak (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    status = dict(line.split(":", 1) for line in lines)
    return {
        name: int(status[key].split()[0]) * 1024
        for name, key in (("now", "VmRSS"), ("peak", "VmHWM"))
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
