"""Damaged DICOM objects: whatever is done to one, it is refused with a status, or answered."""

from io import BytesIO
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from listen_process import PEER, StandIn, configuration, study
from pydicom.uid import ImplicitVRLittleEndian
from pynetdicom.dimse_primitives import C_STORE
from pynetdicom.dsutils import create_file_meta, encode, encode_file_meta

from medmoe_edge.bedside.listen import receiving as listen_receiving
from medmoe_edge.bedside.listen.node import Node


@given(data=st.data())
@settings(max_examples=100)
def test_damaged_objects_are_refused_or_answered(data: st.DataObject, fuzzed: Node) -> None:
    whole = fuzz_source()
    edits = st.lists(st.tuples(st.integers(0, len(whole) - 1), st.integers(0, 255)), max_size=8)
    damaged = bytearray(whole)
    for at, value in data.draw(edits):
        damaged[at] = value
    del damaged[data.draw(st.integers(len(whole) // 2, len(whole))) :]
    check_fuzzed(fuzzed, bytes(damaged))


def fuzz_source() -> bytes:
    """A dataset's bytes as they are sent (Implicit VR Little Endian)."""
    found = encode(study(), is_implicit_vr=True, is_little_endian=True)
    assert found is not None
    return found


def check_fuzzed(node: Node, data: bytes) -> int:
    """Give it to the handlers as if it had come over the wire; it is refused, or answered."""
    receiving = listen_receiving.Receiving(
        node.configuration, node.folder, node.queue, lambda: None
    )
    status = int(receiving.store(fake_event(data)).Status)  # type: ignore[arg-type]
    if status == 0:
        for key in node.queue.waiting(1):
            node.answering.do(key)
        with node.queue._database as database:  # so that the next is not taken for the same
            database.execute("DELETE FROM answer")
            database.execute("DELETE FROM object")
        assert node.queue.counts()["failed"] == 0
    else:
        assert status in (0x0124, 0xA900, 0xC000)
    assert list(node.folder.images.iterdir()) == []
    return status


def fake_event(data: bytes) -> SimpleNamespace:
    """What pynetdicom gives to a handler of C-STORE."""
    known = study()
    request = C_STORE()
    request.AffectedSOPClassUID = known.SOPClassUID
    request.AffectedSOPInstanceUID = known.SOPInstanceUID
    request.DataSet = BytesIO(data)
    meta = create_file_meta(
        sop_class_uid=known.SOPClassUID,
        sop_instance_uid=known.SOPInstanceUID,
        transfer_syntax=ImplicitVRLittleEndian,
    )
    return SimpleNamespace(
        request=request,
        context=SimpleNamespace(abstract_syntax=known.SOPClassUID),
        assoc=SimpleNamespace(requestor=SimpleNamespace(ae_title=PEER)),
        encoded_dataset=lambda: b"\0" * 128 + b"DICM" + encode_file_meta(meta) + data,
    )


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory: pytest.TempPathFactory) -> Node:
    """A node at rest, every kind of document wanted."""
    folder = tmp_path_factory.mktemp("fuzzed")
    documents = ["comprehensive-3d-sr", "fhir-r5"]
    node = Node(configuration(folder / "node", documents=documents), StandIn())
    return node


def test_the_undamaged_one_is_answered(fuzzed: Node) -> None:
    assert check_fuzzed(fuzzed, fuzz_source()) == 0
