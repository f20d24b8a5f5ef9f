"""Studies by C-STORE to a DICOM node that is killed again and again: each is answered once.

    PYTHONPATH=tests/helpers:tests/unit \
        python tests/stress/stress_listen.py [STUDIES] [KILLS] [SECONDS_TO_ANSWER|nano] [SLICES]

Each is of a patient of its own and has a series of so many slices; all are sent interleaved. An
archive beside it gets the reports. At the end each study has one report, in its own patient's name,
which came once or as the same bytes again; the audit log is whole and has every answer, and the
node's folder holds no image any more.
"""

import json
import random
import sys
import tempfile
import threading
import time
from pathlib import Path

from listen_process import PEER, QUESTION, Archive, free_port, send, start_node, study
from pydicom import Dataset

from medmoe_edge.bedside.audit.log import verify_log
from medmoe_edge.bedside.listen.queue import Queue


def stress(
    folder: Path,
    studies: int,
    kills: int,
    seconds: float | str = 0.0,
    slices: int = 1,
    seed: int = 0,
) -> dict[str, float]:
    """Send them all, killing on the way; raises AssertionError unless all is as it must be."""
    port, chance, start = free_port(), random.Random(seed), time.monotonic()
    with Archive() as archive:
        config = folder / "listen.json"
        config.write_text(json.dumps(_configuration(folder, port, archive.port)))
        process = start_node(config, seconds)
        waiting = [(one, each) for each in range(slices) for one in range(1, studies + 1)]
        sent = len(waiting) // (kills + 1)

        def made(number: tuple[int, int]) -> Dataset:
            return slice_of(*number, slices)

        killed = resent = 0
        try:
            while waiting or killed < kills:
                burst = waiting[: max(1, sent)]
                calm = chance.randrange(len(burst)) if killed < kills and burst else len(burst)
                statuses = send(port, *map(made, burst[:calm]))
                # At some moment of what follows the node ends.
                killer = threading.Timer(chance.uniform(0.0, 0.1), process.kill)
                if killed < kills:
                    killer.start()
                statuses += send(port, *map(made, burst[calm:]))
                kept = {each for each, status in zip(burst, statuses, strict=True) if not status}
                resent += len(burst) - len(kept)
                waiting = [number for number in waiting if number not in kept]
                if killed < kills:
                    killer.join()
                    process.wait(30)
                    process.stdout.close()  # type: ignore[union-attr]
                    killed += 1
                    process = start_node(config, seconds)
            _wait_for_all(archive, studies)
            unsent = _drain(folder)
        finally:
            process.kill()
            process.wait(30)
            process.stdout.close()  # type: ignore[union-attr]
        _check(archive, studies, folder)
    return {
        "studies": studies,
        "kills": killed,
        "sent_again": resent,
        "reports": len(archive.received),
        "deliveries": sum(archive.forms.values()),
        "audit_entries": verify_log(folder / "node" / "audit.jsonl").entries,
        "unsent": unsent,
        "seconds": round(time.monotonic() - start, 1),
    }


def slice_of(one: int, number: int, slices: int) -> Dataset:
    """A slice of a study, which says how many there are."""
    return study(
        one,
        SOPInstanceUID=f"1.2.826.0.4711.{one}.3.{number}",
        InstanceNumber=number,
        NumberOfSeriesRelatedInstances=str(slices),
        PatientID=f"MRN-4711-{one}",
    )


def _configuration(folder: Path, port: int, archive: int) -> dict[str, object]:
    return {
        "folder": str(folder / "node"),
        "port": port,
        "reserve_mb": 0,
        "peers": [{"ae_title": PEER}],
        "questions": [{"ask": [QUESTION]}],
        "series": {"quiet": 60, "linger": 0},
        "dicom": [{"ae_title": "ARCHIVE", "host": "127.0.0.1", "port": archive}],
    }


def _wait_for_all(archive: Archive, studies: int) -> None:
    quiet, known = time.monotonic(), -1
    while len(archive.received) < studies:
        if len(archive.received) != known:
            known, quiet = len(archive.received), time.monotonic()
        assert time.monotonic() - quiet < 60, f"{known} of {studies} reports, and no more come"
        time.sleep(0.05)


def _drain(folder: Path) -> int:
    """Until the node knows that all is sent."""
    queue = Queue(folder / "node" / "queue.sqlite")
    try:
        end = time.monotonic() + 60
        counts = queue.counts()
        while counts["waiting"] + counts["unsent"] and time.monotonic() < end:
            time.sleep(0.05)
            counts = queue.counts()
        assert counts["failed"] == 0
        return counts["unsent"]
    finally:
        queue.close()


def _check(archive: Archive, studies: int, folder: Path) -> None:
    answered = [
        reports[0].CurrentRequestedProcedureEvidenceSequence[0].StudyInstanceUID
        for reports in archive.received.values()
    ]
    wanted = {str(study(number).StudyInstanceUID) for number in range(1, studies + 1)}
    for reports in archive.received.values():
        number = str(reports[0].StudyInstanceUID).split(".")[5]
        assert reports[0].PatientID == f"MRN-4711-{number}", "a report is in another's name"
    assert len(answered) == studies, "a study was answered twice"
    assert set(answered) == wanted, "a study was lost"
    assert len(archive.forms) == studies, "a report was sent again as another"
    report = verify_log(folder / "node" / "audit.jsonl")
    assert report.intact or report.fault == "torn"
    assert report.entries >= studies
    assert not list((folder / "node" / "images").glob("*.dcm"))


if __name__ == "__main__":
    given = sys.argv[1:]
    with tempfile.TemporaryDirectory() as place:
        found = stress(
            Path(place),
            int(given[0]) if given else 1000,
            int(given[1]) if len(given) > 1 else 20,
            given[2] if len(given) > 2 else "0",
            int(given[3]) if len(given) > 3 else 1,
        )
    print(json.dumps(found))
