"""The package's version and the oldest ONNX Runtime it runs on; reading them imports neither."""

import functools
import re

__version__ = "0.2.0"
OLDEST_ONNXRUNTIME = (1, 24)  # as in pyproject.toml: tests/unit/test_lock.py compares them


@functools.cache
def too_old(onnxruntime: str) -> tuple[str, str] | None:
    """What is wrong with that version of ONNX Runtime, and its remedy; None if nothing is."""
    numbers = re.match(r"(\d+)\.(\d+)", onnxruntime)
    if numbers is None or (int(numbers[1]), int(numbers[2])) >= OLDEST_ONNXRUNTIME:
        return None
    oldest = ".".join(map(str, OLDEST_ONNXRUNTIME))
    return (
        f"ONNX Runtime {onnxruntime} is installed, but {oldest} or later is needed.",
        f"Update it: pip install 'onnxruntime>={oldest}' (or onnxruntime-gpu, if it is that one).",
    )
