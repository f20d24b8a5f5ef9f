"""For the tests of listen: a node with a stand-in engine, in this process or one of its own."""

import os
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from command_line import answer_to
from dicom_files import made
from pydicom import Dataset
from pydicom.uid import ComputedRadiographyImageStorage
from pynetdicom import evt
from pynetdicom.ae import ApplicationEntity
from pynetdicom.events import Event

import medmoe_edge
from medmoe_edge.bedside.listen import node
from medmoe_edge.bedside.listen.config import Configuration, load_configuration
from medmoe_edge.bedside.listen.node import Node
from medmoe_edge.contrastive.features import Location, Reading
from medmoe_edge.engine.answer import Answer
from medmoe_edge.image.pixels import Image, Pixels

node.IDLE = 0.05  # seconds until a node's threads look again; tests have many nodes
PEER = "SENDER"
QUESTION = "Is there é effusion?"
SOME = np.arange(256, dtype=np.uint8).reshape(16, 16)


class StandIn:
    """Answers "No", after `seconds`; of a black picture something else, for it looks."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds, self.asked = seconds, 0

    def ask_all(
        self, image: Image, questions: Sequence[str], *, max_new_tokens: int, **_: Any
    ) -> list[Answer]:
        self.asked += 1
        time.sleep(self.seconds)
        said = ["No"] if image.pixels.any() else ["Nothing"]
        return [answer_to(question, *said) for question in questions]

    def seen(self, image: Image) -> Pixels:
        return image.pixels[::2, ::2]


def located(image: Image, phrase: str) -> Location:
    """A phrase in the middle of a picture."""
    height, width = image.pixels.shape[:2]
    heat = np.zeros((height, width), np.float32)
    heat[height // 2, width // 2] = 1
    model = {"name": "fake", "sha256": "0" * 64}
    reading = Reading({}, model, "xray", {"xray": 0.9, "ct": 0.1}, 0.3, unfamiliar=False)
    return Location({}, model, phrase, heat, (width // 2, height // 2), 0.25, reading)


def configuration(folder: Path, **values: Any) -> Configuration:
    """One that lets `PEER` in and asks one question of everything."""
    given: dict[str, Any] = {
        "folder": folder,
        "port": 0,
        "reserve_mb": 0,
        "peers": [{"ae_title": PEER}],
        "questions": [{"ask": [QUESTION]}],
        "series": {"quiet": 0, "linger": 0},
    }
    return Configuration.model_validate(given | values)


def study(number: int = 1, **attributes: Any) -> Dataset:
    """A small radiograph, a study of its own."""
    uids = {
        "SOPClassUID": ComputedRadiographyImageStorage,
        "SOPInstanceUID": f"1.2.826.0.4711.{number}.3",
        "SeriesInstanceUID": f"1.2.826.0.4711.{number}.2",
        "StudyInstanceUID": f"1.2.826.0.4711.{number}.1",
    }
    given = {"Modality": "CR", "BodyPartExamined": "CHEST", "StudyDate": "20240506"}
    return made(SOME, **(uids | given | attributes))


def send(port: int, *datasets: Dataset, title: str = PEER, called: str = "MEDMOE") -> list[int]:
    """The status of each by C-STORE; -1 where none came back, and for all without association."""
    if not datasets:
        return []
    entity = ApplicationEntity(title)
    entity.acse_timeout = entity.dimse_timeout = entity.network_timeout = 60
    for uid in {dataset.SOPClassUID for dataset in datasets}:
        entity.add_requested_context(uid)
    association = entity.associate("127.0.0.1", port, ae_title=called)
    if not association.is_established:
        return [-1] * len(datasets)
    try:
        return [_stored(association, dataset) for dataset in datasets]
    finally:
        association.release()


def _stored(association: Any, dataset: Dataset) -> int:
    try:
        return int(association.send_c_store(dataset).get("Status", -1))
    except (RuntimeError, ValueError):  # the other side has gone, or takes no such class
        return -1


def wait_for(what: Callable[[], bool], seconds: float = 60.0) -> None:
    """Wait until it is so, or fail."""
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.02)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Archive:
    """A destination: keeps what it is sent, counting the distinct bytes under each UID."""

    def __init__(self, port: int = 0) -> None:
        self.received: dict[str, list[Dataset]] = {}
        self.forms: Counter[tuple[str, bytes]] = Counter()
        self.refuse = 0
        self._lock = threading.Lock()
        self._entity = ApplicationEntity("ARCHIVE")
        for ending in ("88.34", "88.11", "88.59", "7"):  # reports, key objects, captures
            self._entity.add_supported_context(f"1.2.840.10008.5.1.4.1.1.{ending}")
        self._server = self._entity.start_server(
            ("127.0.0.1", port), block=False, evt_handlers=[(evt.EVT_C_STORE, self._store)]
        )
        assert self._server is not None
        self.port = int(self._server.server_address[1])

    def _store(self, event: Event) -> int:
        with self._lock:
            if self.refuse:
                self.refuse -= 1
                return 0xA700
            dataset = event.dataset
            dataset.file_meta = event.file_meta
            uid = str(dataset.SOPInstanceUID)
            self.received.setdefault(uid, []).append(dataset)
            self.forms[uid, event.encoded_dataset(include_meta=False)] += 1
            return 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._entity.shutdown()


def start_node(config: Path, seconds: float | str = 0.0) -> "subprocess.Popen[str]":
    """The node in a process of its own; it is listening once this returns.

    `seconds` is what the stand-in takes to answer, or the name of a model that answers in truth.
    """
    root = Path(__file__).parents[2]
    paths = os.pathsep.join(map(str, (root, root / "tests" / "unit")))
    process = subprocess.Popen(
        [sys.executable, __file__, str(config), str(seconds)],
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


if __name__ == "__main__":
    given = sys.argv[2]
    engine = StandIn(float(given)) if given[0].isdigit() else medmoe_edge.load(given)
    with Node(load_configuration(Path(sys.argv[1])), engine):
        print("ready", flush=True)
        threading.Event().wait()
