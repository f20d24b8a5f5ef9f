"""So many requests made from the service's own OpenAPI document; none may fail on our side.

    PYTHONPATH=.:tests/helpers:tests/unit:tests/service \
        python tests/stress/stress_schema.py [CASES]

Half of them fit the document and half do not. A stand-in answers in the place of the model, so that
what is tried is the service. Every answer's status and body must be as the document says, and what
a chat had beside the document's fields must be refused, or said to be without effect.
"""

import collections
import json
import sys
import time

from schemathesis import GenerationMode
from serving import StandIn, live
from test_serve_schema import asked

EXAMPLES = 25  # of each route, at once


def stress(cases: int) -> dict[str, object]:
    """Ask until there were so many; figures of what came back."""
    statuses, started = collections.Counter[int](), time.monotonic()
    with live(StandIn()) as url:
        while statuses.total() < cases:
            for mode in GenerationMode:
                seen = asked(url, mode, EXAMPLES)
                statuses.update(status for _, status in seen.elements())
            print(f"{statuses.total():,} of {cases:,}", file=sys.stderr, flush=True)
    assert max(statuses) < 500, statuses
    seconds = round(time.monotonic() - started)
    by_status = {str(status): count for status, count in sorted(statuses.items())}
    return {"cases": statuses.total(), "by_status": by_status, "seconds": seconds}


if __name__ == "__main__":
    print(json.dumps(stress(int(sys.argv[1]) if len(sys.argv) > 1 else 5000), indent=2))
