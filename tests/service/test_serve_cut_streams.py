"""Streams that end after their first token leave their records: nano itself answers."""

import collections
import json
from pathlib import Path

import httpx
from command_line import ROOT
from test_serve_live import served, until

from medmoe_edge.bedside.audit.log import verify_log

STREAMS = 30
# Long enough that none is over when its reader has gone.
QUESTION = "Describe the image in detail, and list every finding."


def events_of(log: Path) -> dict[str, collections.Counter[str]]:
    """How often each event stands in an audit log, by the question."""
    found: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for line in log.read_text("utf-8").splitlines():
        entry = json.loads(line)
        found[entry["question"]][entry["event"]] += 1
    return found


def test_thirty_streams_cut_off_leave_thirty_records(tmp_path: Path) -> None:
    audit, picture = tmp_path / "audit.jsonl", (ROOT / "scan.png").read_bytes()
    with served("--audit", str(audit), log=tmp_path / "log") as (_, url):
        for number in range(STREAMS):
            asked = {"question": f"{number}. {QUESTION}", "stream": "true"}
            asked["max_new_tokens"] = "64"
            with (
                httpx.Client(base_url=url, trust_env=False, timeout=120) as client,
                client.stream("POST", "/v1/ask", data=asked, files={"image": picture}) as stream,
            ):
                assert next(stream.iter_lines()) == "event: token"
                assert f"{number}. {QUESTION}" in audit.read_text("utf-8"), "before its answer"

        def is_over() -> bool:
            ended = [found["aborted"] + found["ask"] for found in events_of(audit).values()]
            return len(ended) == STREAMS and all(ended)

        until(is_over)
    events = events_of(audit)
    assert len(events) == STREAMS
    for question, found in events.items():
        assert found["accepted"] == 1, question
        assert found["aborted"] + found["ask"] == 1, question
    assert sum(found["aborted"] for found in events.values()) > 0, "none was cut off"
    assert verify_log(audit).intact
