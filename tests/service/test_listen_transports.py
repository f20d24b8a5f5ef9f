"""How a department is connected, each way against a real peer: Orthanc with its DICOMweb plugin,
DCMTK over TLS, an MLLP server.
"""

import asyncio
import contextlib
import gzip
import itertools
import json
import socket
import subprocess
import threading
import time
import tracemalloc
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import hl7
import hl7.mllp
import httpx
import pytest
import trustme
from bombs import deflated_dicom
from dicom_files import saved
from dicom_peers import PLUGINS, get, orthanc_at, post_to, put_to, tool
from listen_process import (
    PEER,
    Archive,
    StandIn,
    configuration,
    free_port,
    send,
    study,
    wait_for,
)
from patients import SECRETS
from pydicom import Dataset, dcmread
from pydicom import config as pydicom_config
from pynetdicom.ae import ApplicationEntity
from pynetdicom.events import Event

from medmoe_edge.bedside.listen.config import Configuration, Tls, load_configuration
from medmoe_edge.bedside.listen.desk import Desk
from medmoe_edge.bedside.listen.fetching import Retrieved
from medmoe_edge.bedside.listen.node import Node, figures
from medmoe_edge.bedside.listen.receiving import multipart
from medmoe_edge.bedside.listen.sending import commitment_handlers
from medmoe_edge.errors import InputError

# pynetdicom leaves a socket to the garbage collector where its peer hung up first.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
STUDY = str(study().StudyInstanceUID)


class Orthanc(NamedTuple):
    """An Orthanc that knows the node by its port."""

    dicom: int
    rest: int
    node: int

    @property
    def web(self) -> str:
        """The base of its DICOMweb."""
        return f"http://127.0.0.1:{self.rest}/dicom-web"

    def keeps(self) -> set[str]:
        """The SOP Instance UIDs that it has."""
        found = json.loads(get(self.rest, "/instances?expand"))
        return {each["MainDicomTags"]["SOPInstanceUID"] for each in found}

    def take(self, *datasets: Dataset, folder: Path) -> None:
        for dataset in datasets:
            post_to(self.rest, "/instances", saved(folder, dataset).read_bytes())


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Orthanc]:
    if not Path(PLUGINS, "libOrthancDicomWeb.so").exists():
        pytest.skip("needs Orthanc's DICOMweb plugin (Debian: orthanc-dicomweb)")
    port = free_port()
    with orthanc_at(
        tmp_path_factory.mktemp("orthanc"),
        Plugins=[PLUGINS],
        DicomModalities={"node": ["MEDMOE", "127.0.0.1", port]},
        DicomWeb={"Enable": True},
    ) as (dicom, rest):
        yield Orthanc(dicom, rest, port)


@pytest.fixture
def orthanc(started: Orthanc) -> Orthanc:
    """With nothing in it."""
    for each in json.loads(get(started.rest, "/patients")):
        post_to(started.rest, f"/patients/{each}", b"", "DELETE")
    return started


def beside(orthanc: Orthanc, folder: Path, **values: Any) -> Configuration:
    """A node on the port that Orthanc knows."""
    peers = [{"ae_title": PEER}, {"ae_title": "ORTHANC"}]
    return configuration(folder / "node", port=orthanc.node, peers=peers, **values)


def sent(node: Node) -> None:
    """Wait until an answer has gone to where it is to go."""
    wait_for(lambda: node.queue.counts()["answered"] == 1)
    wait_for(lambda: node.queue.counts()["unsent"] == 0)


def documents(node: Node) -> set[str]:
    return {str(dcmread(each).SOPInstanceUID) for each in node.folder.documents.glob("*/*.dcm")}


class Authority:
    """Certificates as files: of an authority, of `localhost` from it, and from another."""

    def __init__(self, folder: Path) -> None:
        authority, stranger = trustme.CA(), trustme.CA()
        issued = authority.issue_cert("localhost", "127.0.0.1")
        other = stranger.issue_cert("localhost", "127.0.0.1")
        self.ca, self.cert, self.key = folder / "ca.pem", folder / "cert.pem", folder / "key.pem"
        self.others_cert, self.others_key = folder / "o.pem", folder / "ok.pem"
        authority.cert_pem.write_to_path(self.ca)
        issued.cert_chain_pems[0].write_to_path(self.cert)
        issued.private_key_pem.write_to_path(self.key)
        other.cert_chain_pems[0].write_to_path(self.others_cert)
        other.private_key_pem.write_to_path(self.others_key)

    def tls(self, **more: Any) -> dict[str, str]:
        """As the configuration has it."""
        files = {"certificate": self.cert, "key": self.key, "authority": self.ca}
        return {name: str(path) for name, path in (files | more).items()}


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


def test_dcmtk_sends_over_tls_and_nobody_else(tmp_path: Path, authority: Authority) -> None:
    store, path = tool("storescu"), saved(tmp_path, study())
    with Node(configuration(tmp_path / "node", tls=authority.tls()), StandIn()) as node:
        who = ["-aet", PEER, "-aec", "MEDMOE", "localhost", str(node.port), str(path)]
        trusting = ["+cf", str(authority.ca)]
        ours = ["+tls", str(authority.key), str(authority.cert)]
        theirs = ["+tls", str(authority.others_key), str(authority.others_cert)]

        def ended(*options: str) -> int:
            command = [store, *options, *who]
            return subprocess.run(command, capture_output=True, timeout=60, check=False).returncode

        silent = socket.create_connection(("127.0.0.1", node.port))  # holds nobody up
        assert ended() != 0  # without TLS
        assert ended(*theirs, *trusting) != 0  # of another authority
        assert node.queue.counts()["waiting"] == node.queue.counts()["answered"] == 0
        assert ended(*ours, *trusting) == 0
        silent.close()
        wait_for(lambda: node.queue.counts()["answered"] == 1)


def test_reports_go_to_dcmtk_over_tls(tmp_path: Path, authority: Authority) -> None:
    (tmp_path / "kept").mkdir()
    port = free_port()
    command = [tool("storescp"), "+tls", str(authority.key), str(authority.cert)]
    command += ["+cf", str(authority.ca), "-od", str(tmp_path / "kept"), str(port)]
    archive = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    node = {"ae_title": "STORESCP", "host": "localhost", "port": port, "tls": authority.tls()}
    try:
        with Node(configuration(tmp_path / "node", dicom=[node]), StandIn()) as running:
            assert send(running.port, study()) == [0]
            sent(running)
        assert len(list((tmp_path / "kept").iterdir())) == 1
    finally:
        archive.terminate()
        archive.wait(30)


def test_a_server_of_another_authority_gets_nothing(
    tmp_path: Path, authority: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "kept").mkdir()
    port = free_port()
    command = [tool("storescp"), "+tls", str(authority.others_key), str(authority.others_cert)]
    command += ["+cf", str(authority.ca), "-od", str(tmp_path / "kept"), str(port)]
    archive = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    node = {"ae_title": "STORESCP", "host": "localhost", "port": port, "tls": authority.tls()}
    try:
        with Node(configuration(tmp_path / "node", dicom=[node]), StandIn()) as running:
            assert send(running.port, study()) == [0]
            wait_for(lambda: "over TLS" in caplog.text)
            assert running.queue.counts()["unsent"] == 1
        assert not list((tmp_path / "kept").iterdir())
    finally:
        archive.terminate()
        archive.wait(30)


def test_certificates_of_no_use_are_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "no.pem").write_text("nothing")
    tls = Tls(certificate=tmp_path / "no.pem", key=tmp_path / "no.pem")
    with pytest.raises(InputError, match="certificates under tls"):
        tls.server()


def test_reports_go_to_orthanc_by_stow(tmp_path: Path, orthanc: Orthanc) -> None:
    config = beside(orthanc, tmp_path, stow=[{"url": orthanc.web}])
    with Node(config, StandIn()) as node:
        assert send(node.port, study()) == [0]
        sent(node)
        assert orthanc.keeps() == documents(node) != set()


def test_orthanc_sends_by_stow(tmp_path: Path, orthanc: Orthanc) -> None:
    orthanc.take(study(1), study(2), folder=tmp_path)
    with Node(beside(orthanc, tmp_path, http={"port": 0}), StandIn()) as node:
        place = {"Url": f"http://127.0.0.1:{node.web_port}/"}
        put_to(orthanc.rest, "/dicom-web/servers/node", json.dumps(place).encode())
        wanted = json.dumps({"Resources": json.loads(get(orthanc.rest, "/studies"))}).encode()
        post_to(orthanc.rest, "/dicom-web/servers/node/stow", wanted)
        wait_for(lambda: node.queue.counts()["answered"] == 2)


def body_of(*parts: bytes) -> tuple[bytes, dict[str, str]]:
    """A request of STOW-RS."""
    head = b"--ends\r\nContent-Type: application/dicom\r\n\r\n"
    body = b"".join(head + part + b"\r\n" for part in parts) + b"--ends--\r\n"
    kind = 'multipart/related; type="application/dicom"; boundary=ends'
    return body, {"Content-Type": kind}


def test_stow_says_what_became_of_each_object(tmp_path: Path) -> None:
    one, two = (saved(tmp_path, study(number)).read_bytes() for number in (1, 2))
    with Node(configuration(tmp_path / "node", http={"port": 0}), StandIn()) as node:
        url = f"http://127.0.0.1:{node.web_port}/studies"

        def post(where: str, *parts: bytes) -> tuple[int, Any]:
            body, headers = body_of(*parts)
            found = httpx.post(where, content=body, headers=headers, timeout=30)
            return found.status_code, found.json()

        status, told = post(url, one)
        assert status == 200
        (kept,) = told["00081199"]["Value"]
        assert kept["00081155"]["Value"] == [study(1).SOPInstanceUID]
        status, told = post(f"{url}/{study(1).StudyInstanceUID}", one, two, b"no DICOM")
        assert status == 202
        reasons = [each["00081197"]["Value"] for each in told["00081198"]["Value"]]
        assert reasons == [[0xA900], [0xC000]]
        assert post(url, b"no DICOM")[0] == 409
        body, headers = body_of(one)
        for cut, given in ((body[:-20], headers), (body, {})):
            assert httpx.post(url, content=cut, headers=given, timeout=30).status_code == 400
        wait_for(lambda: node.queue.counts()["answered"] == 1)


def test_a_bomb_is_refused_before_it_is_inflated(tmp_path: Path) -> None:
    with Node(configuration(tmp_path / "node", http={"port": 0}), StandIn()) as node:
        body, headers = body_of(deflated_dicom(64, 64, 1, tail=2**28))
        url = f"http://127.0.0.1:{node.web_port}/studies"
        tracemalloc.start()
        try:
            found = httpx.post(url, content=body, headers=headers, timeout=60)
            assert tracemalloc.get_traced_memory()[1] < 2**26
        finally:
            tracemalloc.stop()
        assert found.status_code == 409
        assert found.json()["00081198"]["Value"][0]["00081197"]["Value"] == [0xC000]


@pytest.mark.parametrize(
    "kind",
    ["", "multipart/related", "multipart/form-data; boundary=ends", 'multipart/related; type="x"'],
)
def test_only_dicom_in_parts_is_stowed(kind: str) -> None:
    body, headers = body_of(b"data\r\n--end", b"")
    pieces = [body[at : at + 7] for at in range(0, len(body), 7)]
    for each in (pieces, [body]):
        assert list(multipart(each, headers["Content-Type"], 99)) == [b"data\r\n--end", b""]
    assert list(multipart(pieces, headers["Content-Type"], 3)) == [b"data", b""]
    with pytest.raises(ValueError, match=r"."):
        list(multipart([body], kind, 99))
    with pytest.raises(ValueError, match="no end"):
        list(multipart(pieces[:-1], headers["Content-Type"], 99))


def test_who_breaks_off_while_sending_leaves_a_line_in_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with Node(configuration(tmp_path / "node", http={"port": 0}), StandIn()) as node:
        with socket.create_connection(("127.0.0.1", node.web_port)) as link:
            head = "POST /studies HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 9999\r\n\r\nPart"
            link.sendall(head.encode())
            time.sleep(0.2)
        wait_for(lambda: "broke off" in caplog.text)
    assert "Traceback" not in caplog.text


def test_others_than_this_machine_need_a_token(tmp_path: Path, authority: Authority) -> None:
    token = tmp_path / "tokens"
    token.write_text("pacs 0123456789abcdef0123\n")
    token.chmod(0o600)
    with pytest.raises(ValueError, match="token_file and tls"):
        configuration(tmp_path / "node", http={"host": "0.0.0.0"})
    tls = {"certificate": str(authority.cert), "key": str(authority.key)}
    web = {"port": 0, "token_file": str(token), "tls": tls}
    with Node(configuration(tmp_path / "node", http=web), StandIn()) as node:
        body, headers = body_of(saved(tmp_path, study()).read_bytes())
        url = f"https://localhost:{node.web_port}"
        context = Tls(authority=authority.ca).client()
        with httpx.Client(verify=context, timeout=30) as client:
            assert client.post(f"{url}/studies", content=body, headers=headers).status_code == 401
            headers["Authorization"] = "Bearer 0123456789abcdef0123"
            assert client.post(f"{url}/studies", content=body, headers=headers).status_code == 200
        wait_for(lambda: node.queue.counts()["answered"] == 1)
        assert "DICOMweb pacs" in (node.folder.root / "audit.jsonl").read_text()


TAKEN = "MRN-0007"  # a patient of whom all destinations here take everything
NOTHING: tuple[int, dict[str, str], bytes] = (204, {}, b"")


class Web:
    """A server of DICOMweb and FHIR that answers the same to all of a method and first letters."""

    def __init__(self, **answers: tuple[int, dict[str, str], bytes]) -> None:
        self.asked: list[str] = []

        class Handler(BaseHTTPRequestHandler):
            def log_message(*_: object) -> None:
                """Not to the console."""

            def answer(this) -> None:
                """By the last word of the path."""
                self.asked.append(this.command)
                said = this.rfile.read(int(this.headers.get("Content-Length", 0)))
                what = "query" if "?" in this.path else this.command.lower()
                status, headers, body = answers[what] if TAKEN.encode() not in said else NOTHING
                this.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(body))}.items():
                    this.send_header(name, value)
                this.end_headers()
                with contextlib.suppress(OSError):  # who asked has hung up
                    this.wfile.write(body)

            do_GET = do_POST = answer

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}/dicom-web"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    def __enter__(self) -> "Web":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(10)


def listed(scan: Dataset) -> tuple[int, dict[str, str], bytes]:
    """An answer to QIDO-RS."""
    found = Dataset()
    for name in ("StudyInstanceUID", "PatientID", "StudyDate", "StudyTime"):
        setattr(found, name, scan.get(name, ""))
    return 200, {}, json.dumps([found.to_json_dict()]).encode()


@contextlib.contextmanager
def little_memory() -> Iterator[None]:
    """What is done within takes less than what a bomb would inflate to."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < 2**27 + 2**25  # with what is imported
    finally:
        tracemalloc.stop()


BOMB = 2**28  # bytes that a bomb inflates to


@pytest.mark.parametrize("coding", ["gzip", "deflate"])
@pytest.mark.parametrize("large", [0, BOMB])
def test_a_compressed_answer_is_inflated_as_far_as_an_object_may_be_large(
    tmp_path: Path, coding: str, large: int
) -> None:
    pack = gzip.compress if coding == "gzip" else zlib.compress
    body, kind = body_of(*([bytes(large)] if large else []), saved(tmp_path, study()).read_bytes())
    answer = 200, kind | {"Content-Encoding": coding}, pack(body, 1)
    with Web(query=listed(study()), get=answer) as web:
        values: dict[str, Any] = {"sources": [{"url": web.url}], "max_object_mb": 1}
        with little_memory(), Node(configuration(tmp_path / "node", **values), StandIn()) as node:
            number = node.desk.request(STUDY, 0, "")
            wait_for(lambda: node.desk.fetched(number)[0] != "waiting")
            why = "1 of 2 objects were not kept (It is larger than max_object_mb allows)"
            assert node.desk.fetched(number) == ("fetched", why if large else "")
            wait_for(lambda: node.queue.counts()["answered"] == 1)


def test_a_deflated_object_from_a_source_is_not_inflated(tmp_path: Path) -> None:
    body, kind = body_of(deflated_dicom(64, 64, 1, tail=BOMB))
    with Web(query=listed(study()), get=(200, kind, body)) as web:
        config = configuration(tmp_path / "node", sources=[{"url": web.url}])
        with little_memory(), Node(config, StandIn()) as node:
            number = node.desk.request(STUDY, 0, "")
            wait_for(lambda: node.desk.fetched(number)[0] != "waiting")
            why = "1 of 1 objects were not kept (Its transfer syntax cannot be read here)"
            assert node.desk.fetched(number) == ("failed", why)


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        ((200, {"Content-Encoding": "gzip"}, b"[]"), "its answer has over 16.0 MB"),
        ((200, {"Content-Encoding": "br"}, b"[]"), "compresses its answers in a way that was not"),
        ((200, {"Content-Encoding": "gzip"}, b"no"), "no answer: DecodingError"),
        ((200, {}, b'[{"00100020": 1}]'), "it answers the query with something else"),
        ((200, {}, b"<html>"), "it answers the query with something else"),
        ((200, {}, b"[" * 100_000), "it answers the query with something else"),
    ],
)
def test_a_source_that_answers_with_something_else_is_told_of_and_asked_again(
    tmp_path: Path,
    answer: tuple[int, dict[str, str], bytes],
    why: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    if answer[2] == b"[]" and "over" in why:
        answer = (*answer[:2], gzip.compress(b"[" + b" " * BOMB + b"]", 1))
    with Web(query=answer) as web:
        config = configuration(tmp_path / "node", sources=[{"url": web.url}])
        with little_memory(), Node(config, StandIn()) as node:
            number = node.desk.request(STUDY, 0, "")
            wait_for(lambda: "request 1 failed" in caplog.text)
            assert node.desk.fetched(number) == ("waiting", "")
    assert why in caplog.text
    assert STUDY not in caplog.text


@pytest.mark.parametrize("ending", [b"--ends", b""])
def test_a_study_that_is_cut_off_is_fetched_again(
    tmp_path: Path, ending: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    body, kind = body_of(saved(tmp_path, study()).read_bytes())
    cut = body.removesuffix(b"--ends--\r\n") + ending
    with Web(query=listed(study()), get=(200, kind, cut)) as web:
        config = configuration(tmp_path / "node", sources=[{"url": web.url}])
        with Node(config, StandIn()) as node:
            number = node.desk.request(STUDY, 0, "")
            wait_for(lambda: "failed (it sends no whole multipart/related)" in caplog.text)
            assert node.desk.fetched(number) == ("waiting", "")


@pytest.mark.parametrize("way", ["stow", "fhir"])
def test_what_a_destination_says_is_inflated_as_far_as_it_may_be_long(
    tmp_path: Path, way: str, caplog: pytest.LogCaptureFixture
) -> None:
    bomb = gzip.compress(b"{" + b" " * BOMB + b"}", 1)
    with Web(post=(200, {"Content-Encoding": "gzip"}, bomb)) as web:
        place = {"url": web.url} | ({"version": "R4"} if way == "fhir" else {})
        values: dict[str, Any] = {way: [place]}
        with little_memory(), Node(configuration(tmp_path / "node", **values), StandIn()) as node:
            assert send(node.port, study()) == [0]
            if way == "fhir":  # that it is done is said by the status alone
                sent(node)
            else:
                wait_for(lambda: "failed (its answer has over 16.0 MB)" in caplog.text)
                assert node.queue.counts()["unsent"] == 1


KEPT = b'{"00081199": {"vr": "SQ", "Value": [{"00081155": {"vr": "UI", "Value": ["1.2"]}}]}}'
FAILED = {"00081198": {"vr": "SQ", "Value": [{"00081197": {"vr": "US", "Value": [0]}}]}}


LOGIN = (200, {"Content-Type": "Text/HTML; charset=utf-8"}, b"<html>Please log in</html>")


def refused_by_stow(status: int, reason: int) -> tuple[int, dict[str, str], bytes]:
    text = json.dumps(FAILED).replace("[0]", f"[{reason}]")
    return status, {"Content-Type": "application/dicom+json"}, text.encode()


def in_a_list(answer: tuple[int, dict[str, str], bytes]) -> tuple[int, dict[str, str], bytes]:
    return (*answer[:2], b"[{}, %b]" % answer[2])


class Refusing(Archive):
    """A DICOM node that answers every document with one status, but those of `TAKEN`."""

    def __init__(self, status: int) -> None:
        super().__init__()
        self.status = status

    def _store(self, event: Event) -> int:
        super()._store(event)
        return 0 if event.dataset.PatientID == TAKEN else self.status


@contextlib.contextmanager
def refusing(way: str, said: Any) -> Iterator[dict[str, Any]]:
    """The configuration of a destination that says so."""
    if way == "dicom":
        with Refusing(said) as archive:
            yield {"dicom": [{"ae_title": "A", "host": "127.0.0.1", "port": archive.port}]}
    elif way == "hl7":
        with Listener(*[said] * 99) as listener:
            yield {"hl7": [{"host": "127.0.0.1", "port": listener.port}]}
    else:
        with Web(post=said) as web:
            yield {way: [{"url": web.url} | ({"version": "R4"} if way == "fhir" else {})]}


@pytest.mark.parametrize(
    ("way", "said", "why"),
    [
        ("dicom", 0xC000, "it refused the document: 0xC000"),
        ("dicom", 0xA900, "it refused the document: 0xA900"),
        ("dicom", 0x0124, "it refused the document: 0x0124"),
        ("stow", refused_by_stow(409, 0xC000), "it refused the document: 0xC000"),
        ("stow", refused_by_stow(202, 0x0122), "it refused the document: 0x0122"),
        ("stow", in_a_list(refused_by_stow(200, 0xC000)), "it refused the document: 0xC000"),
        ("stow", (415, {}, b""), "it refused: HTTP 415"),
        ("fhir", (422, {}, b"<html>"), "it refused: HTTP 422"),
        ("hl7", "AR", "it refused the message: AR"),
    ],
)
def test_what_is_refused_for_good_is_set_aside_until_it_is_asked_for(
    tmp_path: Path,
    way: str,
    said: Any,
    why: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("medmoe_edge.bedside.listen.sending.MOST_FAILURES", 3)
    with refusing(way, said) as place:
        config = configuration(tmp_path / "node", keep_days=1, **place)
        (destination,) = config.destinations
        with Node(config, StandIn(), first_delay=0.01) as node:
            assert send(node.port, study()) == [0]
            refused = {destination.shown: 1}
            wait_for(lambda: caplog.text.count("again in") > 4)
            assert not node.desk.status(config)[
                "set_aside"
            ]  # it may be the destination's own fault
            assert send(node.port, study(2, PatientID=TAKEN)) == [0]
            wait_for(lambda: "set aside" in caplog.text)
            assert node.desk.status(config)["set_aside"] == refused
            assert node.desk.status(config)["unsent"] == {destination.shown: 0}
            assert f"not taken by {destination.shown}, " in caplog.text
            assert f" times ({why}): set aside" in caplog.text
            told = f'medmoe_listen_set_aside{{destination="{destination.shown}"}} 1'
            assert told in figures(node)
            _, series = node.desk.series()
            (result,) = node.desk.show(series["series"])["results"]
            assert [each["refused"] for each in result["deliveries"]] == [why]
            assert not node.desk.is_finished(result["result"], config.committing)  # so it is kept
            caplog.clear()
            assert node.desk.retry([]) == (0, 1, 0)
            wait_for(lambda: "again in" in caplog.text)
            assert send(node.port, study(3, PatientID=TAKEN)) == [0]
            wait_for(lambda: "set aside" in caplog.text)
            caplog.clear()
            assert node.desk.retry([series["series"][:8]]) == (0, 1, 0)
            wait_for(lambda: "again in" in caplog.text)
            assert send(node.port, study(4, PatientID=TAKEN)) == [0]
            wait_for(lambda: node.desk.status(config)["set_aside"] == refused)
            assert node.desk.requeue([series["series"]], None) == (1, 0)
    for secret in (*SECRETS, STUDY):
        assert secret not in caplog.text
    with (
        contextlib.closing(Desk(config.folder)) as desk,
        pytest.raises(InputError, match="No series"),
    ):
        desk.retry(["beefbeef"])


@pytest.mark.parametrize(
    ("way", "said"),
    [
        ("dicom", 0xA700),
        ("dicom", 0x0110),
        ("stow", refused_by_stow(409, 0xA700)),
        ("stow", (202, {}, b"<NativeDicomModel>")),
        ("stow", (202, {}, b"[{}]")),
        ("stow", (503, {}, b"")),
        ("fhir", (429, {}, b"")),
        ("fhir", (401, {}, b"")),
        ("fhir", (302, {"Location": "/"}, b"")),
        ("fhir", LOGIN),
        ("stow", LOGIN),
    ],
)
def test_what_is_refused_for_now_is_sent_until_it_is_taken(
    tmp_path: Path,
    way: str,
    said: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("medmoe_edge.bedside.listen.sending.MOST_FAILURES", 3)
    with refusing(way, said) as place:
        config = configuration(tmp_path / "node", **place)
        with Node(config, StandIn(), first_delay=0.01) as node:
            assert send(node.port, study()) == [0]
            wait_for(lambda: caplog.text.count("again in") > 4)
            assert node.queue.counts()["unsent"] == 1
            assert send(node.port, study(2, PatientID=TAKEN)) == [0]
            wait_for(lambda: node.queue.counts()["answered"] == 2)
            wait_for(lambda: node.queue.counts()["unsent"] == 1)
            caplog.clear()
            wait_for(lambda: "again in" in caplog.text)
            assert node.queue.counts()["unsent"] == 1
            assert not node.desk.status(config)["set_aside"]
            assert ("it answered with a web page" in caplog.text) == (said == LOGIN)


@pytest.mark.parametrize(("way", "said"), [("dicom", 0xA700), ("fhir", (500, {}, b""))])
def test_what_fails_for_now_does_not_hold_up_what_replaces_it(
    tmp_path: Path, way: str, said: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("medmoe_edge.bedside.listen.sending.MOST_FAILURES", 3)
    with refusing(way, said) as place:
        config = configuration(tmp_path / "node", **place)
        with Node(config, StandIn(), first_delay=0.01) as node:
            assert send(node.port, study()) == [0]
            wait_for(lambda: node.queue.counts()["unsent"] == 1)
            assert send(node.port, study(PatientID=TAKEN)) == [0]

            def arrived() -> list[bool]:
                shown = [node.desk.show(each["series"]) for each in node.desk.series()]
                results = [result for each in shown for result in each["results"]]
                return [each["sent"] for result in results for each in result["deliveries"]]

            wait_for(lambda: any(arrived()))
            assert not all(arrived())


@pytest.mark.parametrize(
    ("way", "said"),
    [
        ("dicom", 0x0111),
        ("dicom", 0xB000),
        ("stow", refused_by_stow(409, 0x0111)),
        ("stow", (200, {}, b"<NativeDicomModel>")),
        ("stow", (202, {}, KEPT)),
        ("stow", (202, {}, b"[%b]" % KEPT)),
        ("stow", (204, {}, b"")),
        ("fhir", (201, {}, b"")),
    ],
)
def test_what_a_destination_has_already_counts_as_taken(
    tmp_path: Path, way: str, said: Any
) -> None:
    with (
        refusing(way, said) as place,
        Node(configuration(tmp_path / "node", **place), StandIn()) as node,
    ):
        assert send(node.port, study()) == [0]
        sent(node)


class Halving:
    """In front of a DICOM node: of what it says to a C-STORE only half comes, and nothing after."""

    def __init__(self, port: int) -> None:
        self._node, self._ended = port, threading.Event()
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port = self._server.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                ours, _ = self._server.accept()
                node = socket.create_connection(("127.0.0.1", self._node))
                for pair in ((ours, node), (node, ours)):
                    threading.Thread(target=self._pass_on, args=pair, daemon=True).start()

    def _pass_on(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError), source:
            while data := source.recv(2**16):
                if target.getpeername()[1] != self._node and data[0] == 4:  # P-DATA, to us
                    target.sendall(data[: len(data) // 2])
                    self._ended.wait()
                    return
                target.sendall(data)

    def __enter__(self) -> "Halving":
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._server.close()


def test_a_destination_that_stops_in_the_middle_holds_nothing_for_good(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("medmoe_edge.bedside.listen.sending.TIMEOUT", 1.0)
    with Archive() as archive, Halving(archive.port) as front:
        place = {"ae_title": "ARCHIVE", "host": "127.0.0.1", "port": front.port}
        config = configuration(tmp_path / "node", dicom=[place])
        with Node(config, StandIn(), first_delay=0.1) as node:
            assert send(node.port, study()) == [0]
            wait_for(lambda: caplog.text.count("again in") > 1)  # asked, and asked again
            assert node.queue.counts()["unsent"] == 1


def test_a_document_that_is_gone_is_told_of_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("medmoe_edge.bedside.listen.sending.MOST_FAILURES", 3)
    with Archive() as archive:
        port, place = archive.port, {"ae_title": "ARCHIVE", "host": "127.0.0.1"}
    config = configuration(tmp_path / "node", dicom=[place | {"port": port}])
    with Node(config, StandIn()) as node:  # nobody is there
        assert send(node.port, study()) == [0]
        wait_for(lambda: node.queue.counts()["unsent"] == 1)
    for path in (tmp_path / "node" / "documents").glob("*/*"):
        path.rename(tmp_path / "away")
    with Archive(port) as archive, Node(config, StandIn(), first_delay=0.01) as node:
        wait_for(lambda: sum(node.desk.status(config)["set_aside"].values()) == 1)
        (tmp_path / "away").rename(path)
        assert node.desk.retry([]) == (0, 1, 0)
        sent(node)


SOURCES = {
    "move": {"ae_title": "ORTHANC", "host": "127.0.0.1", "retrieve": "move"},
    "get": {"ae_title": "ORTHANC", "host": "127.0.0.1", "retrieve": "get"},
    "web": {},
}


@pytest.mark.parametrize("way", SOURCES)
def test_a_study_and_its_priors_are_fetched(tmp_path: Path, orthanc: Orthanc, way: str) -> None:
    place = {"url": orthanc.web} if way == "web" else {"port": orthanc.dicom}
    dates = {1: "20240506", 2: "20230101", 3: "20220101", 4: "20250101"}
    scans = [study(number, StudyDate=date) for number, date in dates.items()]
    scans.append(study(5, StudyDate="20230601", PatientID="OTHER"))
    orthanc.take(*scans, folder=tmp_path)
    config = beside(orthanc, tmp_path, sources=[SOURCES[way] | place], keep_images=True)
    with Node(config, StandIn()) as node:
        desk = Desk(node.folder.root)
        missing = desk.request("1.2.3.4", 0, "")
        number = desk.request(STUDY, 1, "")
        wait_for(lambda: desk.fetched(number)[0] == "fetched", 60)
        assert desk.fetched(missing) == ("failed", "the source has no such study")
        wait_for(lambda: node.queue.counts()["answered"] == 2)
        assert desk.status(config)["requests"] == {"waiting": 0, "fetched": 1, "failed": 1}
        desk.close()
        assert not list(node.folder.requests.iterdir())
        images = [dcmread(path) for path in node.folder.images.glob("*.dcm")]
    assert {str(each.StudyDate) for each in images} == {"20240506", "20230101"}


@pytest.mark.parametrize("way", SOURCES)
def test_what_is_not_kept_of_a_study_is_told(tmp_path: Path, orthanc: Orthanc, way: str) -> None:
    place = {"url": orthanc.web} if way == "web" else {"port": orthanc.dicom}
    same = {"StudyInstanceUID": STUDY}
    orthanc.take(study(1), study(2, BurnedInAnnotation="YES", **same), folder=tmp_path)
    orthanc.take(study(3, BurnedInAnnotation="YES"), folder=tmp_path)
    sources = [SOURCES[way] | place]
    with Node(beside(orthanc, tmp_path, sources=sources), StandIn()) as node:
        partly = node.desk.request(STUDY, 0, "")
        not_at_all = node.desk.request(str(study(3).StudyInstanceUID), 0, "")
        wait_for(lambda: node.desk.status(node.configuration)["requests"]["waiting"] == 0)
        why = "objects were not kept (Its pixels are marked as showing text (burned in))"
        state, told = node.desk.fetched(partly)
        if way == "move":  # Orthanc gives up at the first that is refused, whichever it is
            assert state == "failed"
            assert told.endswith(f"{why}; the source then gave up, and may have more")
            assert told.startswith(("1 of 1", "1 of 2"))
        else:
            assert (state, told) == ("fetched", f"1 of 2 {why}")
        state, told = node.desk.fetched(not_at_all)
        assert state == "failed"
        assert told.startswith(f"1 of 1 {why}")


@pytest.mark.parametrize("way", SOURCES)
def test_a_study_is_fetched_once_there_is_room(
    tmp_path: Path, orthanc: Orthanc, way: str, caplog: pytest.LogCaptureFixture
) -> None:
    place = {"url": orthanc.web} if way == "web" else {"port": orthanc.dicom}
    orthanc.take(study(1), study(2, StudyInstanceUID=STUDY), folder=tmp_path)
    full = beside(orthanc, tmp_path, sources=[SOURCES[way] | place], reserve_mb=10**9)
    with Node(full, StandIn(), first_delay=0.2) as node:
        number = node.desk.request(STUDY, 0, "")
        wait_for(lambda: "request 1 failed (The disk is too full to keep it)" in caplog.text)
        assert node.desk.fetched(number) == ("waiting", "")
        node.receiving.configuration = beside(orthanc, tmp_path)
        wait_for(lambda: node.desk.fetched(number) == ("fetched", ""), 60)
        assert node.desk.status(full)["objects"] == 2


@pytest.mark.parametrize(
    ("leads", "why"),
    [
        ("http://127.0.0.1:{}/dicom-web/studies?x=1", ""),
        ("http://localhost:{}/dicom-web/studies?x=1", "it redirects to elsewhere"),
        ("/dicom-web/studies?x=1", "no answer: TooManyRedirects"),
    ],
)
def test_a_redirect_is_followed_on_the_same_host(
    tmp_path: Path, leads: str, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    """And no further: another host must not learn of the study."""
    body, kind = body_of(saved(tmp_path, study()).read_bytes())
    with Web(query=listed(study())) as web:
        there = 308, {"Location": leads.format(web.port)}, b""
        with Web(query=there, get=(200, kind, body)) as front:
            config = configuration(tmp_path / "node", sources=[{"url": front.url}])
            with Node(config, StandIn()) as node:
                number = node.desk.request(STUDY, 0, "")
                if why:
                    wait_for(lambda: f"request 1 failed ({why})" in caplog.text)
                else:
                    wait_for(lambda: node.desk.fetched(number)[0] == "fetched")
        assert len(web.asked) == (not why)
        assert len(front.asked) < 20


class GivingUp:
    """An association with one that has ten objects, sends two and gives up at the second."""

    def __init__(self, node: Node) -> None:
        self.node, self.dimse_timeout = node, 0.0

    def send_c_find(self, query: Dataset, *_: Any) -> Iterator[tuple[Dataset, Dataset | None]]:
        found, going, done = study(), Dataset(), Dataset()
        going.Status, done.Status = 0xFF00, 0x0000
        yield going, found
        yield done, None

    def send_c_move(self, *asked: Any) -> Iterator[tuple[Dataset, None]]:
        self.node.receiving.moved[asked[-1]](0x0000, "")
        self.node.receiving.moved[asked[-1]](0xC000, "It shows text.")
        last = Dataset()
        last.Status = 0xA702
        last.NumberOfCompletedSuboperations = last.NumberOfFailedSuboperations = 1
        yield last, None

    def release(self) -> None:
        """There is nobody."""


def test_a_source_that_gives_up_after_some_may_have_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = [SOURCES["move"] | {"port": free_port()}]
    with Node(configuration(tmp_path / "node", sources=sources), StandIn()) as node:
        source = GivingUp(node)
        monkeypatch.setattr(
            "medmoe_edge.bedside.listen.fetching.associated", lambda *_, **__: source
        )
        number = node.desk.request(STUDY, 0, "")
        wait_for(lambda: node.desk.fetched(number)[0] != "waiting")
        assert node.desk.fetched(number) == (
            "failed",
            "1 of 2 objects were not kept (It shows text); "
            "the source then gave up, and may have more",
        )


class Pacs(GivingUp):
    """One that names `studies` whatever it is asked for, and refuses to give some out."""

    def __init__(self, studies: Iterable[Dataset], refuses: dict[str, int]) -> None:
        self.studies, self.refuses, self.moved = studies, refuses, Counter[str]()
        self.dimse_timeout, self.aborted = 0.0, False

    def send_c_find(self, query: Dataset, *_: Any) -> Iterator[tuple[Dataset, Dataset | None]]:
        going, done = Dataset(), Dataset()
        going.Status, done.Status = 0xFF00, 0x0000
        yield from ((going, each) for each in self.studies)
        yield done, None

    def send_c_move(self, wanted: Dataset, *_: Any) -> Iterator[tuple[Dataset, None]]:
        self.moved[wanted.StudyInstanceUID] += 1
        last = Dataset()
        last.Status = self.refuses.get(wanted.StudyInstanceUID, 0x0000)
        if not last.Status:
            last.NumberOfCompletedSuboperations = 1
        yield last, None

    def abort(self) -> None:
        self.aborted = True


@contextlib.contextmanager
def fetching(
    folder: Path,
    patch: pytest.MonkeyPatch,
    studies: Iterable[Dataset],
    refuses: dict[str, int],
    kind: type[Pacs] = Pacs,
) -> Iterator[tuple[Node, Pacs]]:
    """A node whose source is such a PACS, which it asks ten times within a second."""
    pacs = kind(studies, refuses)
    patch.setattr("medmoe_edge.bedside.listen.fetching.associated", lambda *_, **__: pacs)
    patch.setattr("medmoe_edge.bedside.listen.node.LONGEST_DELAY", 0.05)
    sources = [SOURCES["move"] | {"port": free_port()}]
    config = configuration(folder / "node", sources=sources)
    with Node(config, StandIn(), first_delay=0.01) as node:
        yield node, pacs


def test_a_list_of_studies_without_end_is_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("medmoe_edge.bedside.listen.fetching.MOST_FOUND", 100)
    endless = (study(number) for number in itertools.count(2))
    with fetching(tmp_path, monkeypatch, endless, {}) as (node, pacs):
        number = node.desk.request(STUDY, 0, "")
        wait_for(lambda: node.desk.fetched(number)[0] != "waiting")
        assert node.desk.fetched(number)[0] == "failed"
    assert pacs.aborted
    assert int(str(next(endless).SOPInstanceUID).split(".")[-2]) < 110
    assert "its list of studies does not end: 100 in 120 s are read" in caplog.text


def test_of_what_a_source_names_only_what_was_asked_for_is_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor the studies of another patient whose number another has issued."""
    own = study(1, PatientID="1", IssuerOfPatientID="A", StudyDate="20240506")
    older = {"PatientID": "1", "StudyDate": "20230101"}
    others = [study(2, PatientID="2", StudyDate="20230101")]
    others += [study(3, **older, IssuerOfPatientID="B"), study(4, PatientID="*")]
    prior = study(5, **older)
    with fetching(tmp_path, monkeypatch, [*others, own, prior], {}) as (node, pacs):
        number = node.desk.request(STUDY, 9, "")
        wait_for(lambda: node.desk.fetched(number) == ("fetched", ""))
        nobodys = node.desk.request("1.2.3", 0, "")
        wait_for(lambda: node.desk.fetched(nobodys)[0] == "failed")
    assert pacs.moved == {STUDY: 1, prior.StudyInstanceUID: 1}


def test_a_study_that_is_refused_for_good_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with fetching(tmp_path, monkeypatch, [study()], {STUDY: 0xA801}) as (node, pacs):
        number = node.desk.request(STUDY, 0, "")
        wait_for(lambda: node.desk.fetched(number)[0] != "waiting")
        why = "it refused the study: 0xA801, 10 times"
        assert node.desk.fetched(number) == ("failed", why)
        assert pacs.moved == {STUDY: 10}
        pacs.refuses[STUDY] = 0xA701  # out of resources: which passes
        number = node.desk.request(STUDY, 0, "")
        wait_for(lambda: pacs.moved[STUDY] > 21)
        assert node.desk.fetched(number) == ("waiting", "")


class Dawdling(Pacs):
    """One that says that it goes on, and sends nothing."""

    def send_c_move(self, wanted: Dataset, *_: Any) -> Iterator[tuple[Dataset, None]]:
        self.moved[wanted.StudyInstanceUID] += 1
        going = Dataset()
        going.Status, going.NumberOfRemainingSuboperations = 0xFF00, 7
        while not self.aborted:
            time.sleep(0.01)
            yield going, None


def test_a_source_that_says_for_ever_that_it_goes_on_is_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("medmoe_edge.bedside.listen.fetching.PATIENCE", 0.2)
    with fetching(tmp_path, monkeypatch, [study()], {}, Dawdling) as (node, pacs):
        number = node.desk.request(STUDY, 0, "")
        wait_for(lambda: pacs.aborted)
        pacs.aborted = False
        wait_for(lambda: pacs.moved[STUDY] > 1)
        assert node.desk.fetched(number) == ("waiting", "")
        wait_for(lambda: pacs.aborted)
    assert "it says that it goes on, and has sent nothing for 0 s" in caplog.text


@pytest.mark.parametrize("status", [0xA701, 0xC001])
def test_an_earlier_study_that_does_not_come_holds_up_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    earlier = [study(number, StudyDate=f"2020010{number}") for number in (2, 3)]
    refuses = {str(earlier[1].StudyInstanceUID): status}
    with fetching(tmp_path, monkeypatch, [study(), *earlier], refuses) as (node, pacs):
        number = node.desk.request(STUDY, 2, "")
        wait_for(lambda: node.desk.fetched(number)[0] != "waiting")
        why = f"earlier studies were not fetched (it refused the study: 0x{status:04X})"
        assert node.desk.fetched(number) == ("fetched", why)
    assert pacs.moved == {
        STUDY: 1,
        earlier[0].StudyInstanceUID: 1,
        earlier[1].StudyInstanceUID: 10,
    }


class Outliving(GivingUp):
    """An association with one that still has an object to send when the node ends."""

    def __init__(self, node: Node) -> None:
        super().__init__(node)
        self.begun = threading.Event()

    def send_c_move(self, *asked: Any) -> Iterator[tuple[Dataset, None]]:
        self.node.receiving.moved[asked[-1]](0x0000, "")
        self.begun.set()
        with contextlib.suppress(OSError):
            while True:  # until nobody listens there any more
                socket.create_connection(("127.0.0.1", self.node.port), 1).close()
                time.sleep(0.05)
        last = Dataset()
        last.Status = 0xB000
        last.NumberOfCompletedSuboperations = last.NumberOfFailedSuboperations = 1
        yield last, None


def test_a_study_is_fetched_again_where_the_node_ended_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configuration(
        tmp_path / "node", sources=[SOURCES["move"] | {"port": free_port()}], max_associations=99
    )
    with Node(config, StandIn()) as node:
        source = Outliving(node)
        monkeypatch.setattr(
            "medmoe_edge.bedside.listen.fetching.associated", lambda *_, **__: source
        )
        number = node.desk.request(STUDY, 0, "")
        assert source.begun.wait(20)
    with contextlib.closing(Desk(config.folder)) as desk:
        assert desk.fetched(number) == ("waiting", "")
    assert len(list((config.folder / "requests").iterdir())) == 1


def test_what_two_associations_bring_at_once_is_all_counted() -> None:
    got = Retrieved()
    other = threading.Thread(target=got.add, args=[0xC000, "no"])

    class Slow(str):
        """While it is read, another association has its object counted, if it can."""

        def rstrip(self, *_: Any) -> str:
            other.start()
            other.join(0.2)
            return "no"

    got.add(0xC000, Slow("no"))
    other.join()
    assert (got.objects, got.refused) == (2, 2)


def test_a_source_that_is_not_there_is_asked_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = {"ae_title": "NOBODY", "host": "127.0.0.1", "port": free_port()}
    with Node(configuration(tmp_path / "node", sources=[source]), StandIn()) as node:
        desk = Desk(node.folder.root)
        number = desk.request(STUDY, 0, "")
        wait_for(lambda: "request 1 failed (it cannot be reached)" in caplog.text)
        assert desk.fetched(number) == ("waiting", "")
        desk.close()
        assert len(list(node.folder.requests.iterdir())) == 1
    assert STUDY not in caplog.text


def test_a_token_that_is_gone_for_now_does_not_end_a_request(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = {"url": "http://127.0.0.1:9", "token_file": tmp_path / "token"}
    with Node(configuration(tmp_path / "node", sources=[source]), StandIn()) as node:
        number = node.desk.request(STUDY, 0, "")
        wait_for(lambda: "request 1 failed (its token_file does not exist.)" in caplog.text)
        assert node.desk.fetched(number) == ("waiting", "")
        for path in node.folder.requests.iterdir():
            path.unlink()
        wait_for(lambda: node.desk.fetched(number)[0] == "failed")
        assert node.desk.fetched(number)[1] == "its UID is gone: ask again"


def test_a_source_that_is_silent_does_not_hold_up_another(tmp_path: Path) -> None:
    body, kind = body_of(saved(tmp_path, study()).read_bytes())
    with (
        socket.create_server(("127.0.0.1", 0)) as silent,
        Web(query=listed(study()), get=(200, kind, body)) as web,
    ):
        port = silent.getsockname()[1]
        sources = [{"ae_title": "SILENT", "host": "127.0.0.1", "port": port}, {"url": web.url}]
        config = configuration(tmp_path / "node", sources=sources)
        with Node(config, StandIn(), patience=0.1) as node:
            waiting = node.desk.request("1.2.3", 0, config.sources[0].shown)
            link, _ = silent.accept()  # it is being asked
            number = node.desk.request(STUDY, 0, config.sources[1].shown)
            unknown = node.desk.request("1.2.3", 0, "gone from the configuration")
            wait_for(lambda: node.desk.fetched(number)[0] == "fetched", 20)
            assert node.desk.fetched(waiting)[0] == "waiting"
            link.close()
            wait_for(lambda: node.desk.fetched(unknown)[0] == "failed")


def test_what_two_sources_bring_at_once_is_counted_for_each(tmp_path: Path) -> None:
    sources = [{"ae_title": name, "host": "127.0.0.1", "port": free_port()} for name in ("A", "B")]
    counted: dict[str, Counter[int]] = {"A": Counter(), "B": Counter()}

    def count(name: str, status: int, why: str) -> None:
        counted[name][status] += 1

    with Node(configuration(tmp_path / "node", sources=sources), StandIn()) as node:
        for message, name in enumerate(counted, 1):
            node.receiving.moved[message] = partial(count, name)
        entity = ApplicationEntity(PEER)
        entity.add_requested_context(study().SOPClassUID)
        link = entity.associate("127.0.0.1", node.port, ae_title="MEDMOE")
        for message, scan in ((1, study(1)), (2, study(2)), (2, study(3, Modality="PR"))):
            told = link.send_c_store(scan, originator_aet="MEDMOE", originator_id=message)
            assert told.Status == 0
        link.send_c_store(study(4), originator_aet="OTHER", originator_id=1)
        link.send_c_store(study(5))
        link.release()
    assert counted == {"A": {0: 1}, "B": {0: 2}}


def test_orthanc_commits_itself_to_what_it_took(tmp_path: Path, orthanc: Orthanc) -> None:
    place = {"ae_title": "ORTHANC", "host": "127.0.0.1", "port": orthanc.dicom, "commitment": True}
    with Node(beside(orthanc, tmp_path, dicom=[place]), StandIn()) as node:
        assert send(node.port, study()) == [0]
        sent(node)
        (name,) = [each.name for each in node.configuration.destinations]
        wait_for(lambda: not node.queue.uncommitted(name, 1))
        wait_for(lambda: node.desk.status(node.configuration)["uncommitted"] == {})
        (result,) = node.folder.documents.iterdir()
        assert node.desk.is_finished(result.name, node.configuration.committing)


def test_who_is_asked_to_commit_itself_must_be_let_in(tmp_path: Path) -> None:
    place = {"ae_title": "PACS", "host": "127.0.0.1", "port": 104, "commitment": True}
    with pytest.raises(ValueError, match="PACS is asked for storage commitment"):
        configuration(tmp_path / "node", dicom=[place])


def test_what_a_destination_does_not_keep_is_told_and_can_be_sent_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    place = {"ae_title": "ARCHIVE", "host": "127.0.0.1"}
    with (
        Archive() as archive,
        Node(
            configuration(tmp_path / "node", dicom=[place | {"port": archive.port}]), StandIn()
        ) as node,
    ):
        (name,) = (each.name for each in node.configuration.destinations)
        assert send(node.port, study()) == [0]
        sent(node)
        (path,) = node.folder.documents.glob("*/*.dcm")
        document = f"{path.parent.name}/{path.name}"
        node.queue.ask_commitment(name, "1.2.9", {document: "1.2.3"})
        told = Dataset()
        told.TransactionUID = "1.2.9"
        failed = Dataset()
        failed.ReferencedSOPInstanceUID, failed.FailureReason = "1.2.3", 0x0110
        told.FailedSOPSequence = [failed]
        handler: Any = commitment_handlers(node.queue)[0][1]
        event = type("Event", (), {"event_information": told})
        assert handler(event) == (0, None)
        assert node.desk.status(node.configuration)["uncommitted"] == {name: 1}
        assert "does not keep 1 documents that it took (0x0110)" in caplog.text
        (series,) = node.desk.series()
        assert node.desk.requeue([series["series"]], None) == (1, 0)
        assert node.desk.status(node.configuration)["uncommitted"] == {}
        wait_for(lambda: sum(archive.forms.values()) == 2)


class Listener:
    """An MLLP server: keeps what it is told, and acknowledges with one of `codes` after another.

    With a line feed behind a code, it ends segments as lines.
    """

    def __init__(self, *codes: str) -> None:
        self.codes, self.heard = list(codes), list[hl7.Message]()
        self.port = 0
        self._ready, self._loop = threading.Event(), asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=[self._serve()])

    async def _serve(self) -> None:
        self._end = asyncio.Event()
        server = await hl7.mllp.start_hl7_server(
            self._client, "127.0.0.1", 0, encoding="utf-8", limit=2**20
        )
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        async with server:
            await self._end.wait()

    async def _client(self, reader: Any, writer: Any) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError):
            while True:
                message = await reader.readmessage()
                self.heard.append(message)
                code = "AA" if TAKEN in str(message) else self.codes.pop(0)
                told = str(message.create_ack(code.strip()))
                writer.writeblock((told.replace("\r", "\r\n") if "\n" in code else told).encode())
                await writer.drain()

    def __enter__(self) -> "Listener":
        self._thread.start()
        assert self._ready.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join(10)
        self._loop.close()


def test_hl7_is_said_until_it_is_accepted(tmp_path: Path) -> None:
    with Listener("AE", "AA\n") as listener:
        receiver = {"host": "127.0.0.1", "port": listener.port, "application": "RIS|1"}
        with Node(
            configuration(tmp_path / "node", hl7=[receiver]), StandIn(), first_delay=0.05
        ) as node:
            assert send(node.port, study(AccessionNumber="A1")) == [0]
            sent(node)
    first, second = listener.heard
    assert str(first) == str(second)
    assert first.unescape(str(first.segment("MSH")[5])) == "RIS|1"
    assert str(first.segment("OBR")[18]) == "A1"
    assert str(first.segment("PID")[3]) == "MRN-4711"
    finding = next(each for each in first.segments("OBX") if str(each[3]).startswith("121071^"))
    assert (str(finding[5]), str(finding[11])) == ("No", "R")


def test_a_result_comes_before_what_withdraws_it(tmp_path: Path) -> None:
    """Else the receiver would be left with the result about the wrong patient."""
    with Listener("AE", *["AA"] * 9) as listener:
        receiver = {"host": "127.0.0.1", "port": listener.port}
        config = configuration(tmp_path / "node", hl7=[receiver])
        with Node(config, StandIn(), first_delay=4.0) as node:
            assert send(node.port, study()) == [0]
            wait_for(lambda: len(listener.heard) == 1)  # refused, and tried again in four seconds
            assert send(node.port, study(PatientID="MRN-0815")) == [0]
            wait_for(lambda: node.queue.counts()["answered"] == 2)
            wait_for(lambda: node.queue.counts()["unsent"] == 0)
    told = [(str(each.segment("PID")[3]), str(each.segment("OBX")[11])) for each in listener.heard]
    assert told[:2] == [("MRN-4711", "R"), ("MRN-4711", "R")]
    assert sorted(told[2:]) == [("MRN-0815", "R"), ("MRN-4711", "W")]


def test_what_was_withdrawn_is_not_sent_after_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("medmoe_edge.bedside.listen.sending.MOST_FAILURES", 2)
    with Listener(*["AE"] * 99) as listener:
        receiver = {"host": "127.0.0.1", "port": listener.port}
        config = configuration(tmp_path / "node", hl7=[receiver])
        with Node(config, StandIn(), first_delay=0.01) as node:
            assert send(node.port, study()) == [0]
            wait_for(lambda: len(listener.heard) > 0)
            assert send(node.port, study(2, PatientID=TAKEN)) == [0]
            wait_for(lambda: sum(node.desk.status(config)["set_aside"].values()) == 1)
            heard, listener.codes = len(listener.heard), ["AA"] * 9
            assert send(node.port, study(PatientID="MRN-0815")) == [0]
            wait_for(lambda: len(listener.heard) == heard + 2)  # what is set aside holds up nothing
            wait_for(lambda: node.queue.counts()["unsent"] == 0)
            assert node.desk.retry([]) == (0, 0, 0)
            assert node.desk.status(config)["set_aside"] == {}  # nobody need look after it


def test_control_characters_do_not_end_a_message_of_hl7(tmp_path: Path) -> None:
    controls = "".join(map(chr, (*range(1, 0x0D), *range(0x0E, 0x20), 0x7F)))  # not NUL: padding
    values: dict[str, Any] = {
        "PatientSex": "M\x1c",
        "AccessionNumber": "A\x1c\r1",
        "PatientID": f"4{controls}7",
    }
    with Listener("AA") as listener:
        receiver = {"host": "127.0.0.1", "port": listener.port}
        with Node(configuration(tmp_path / "node", hl7=[receiver]), StandIn()) as node:
            with pydicom_config.disable_value_validation():
                scan = study(**values)
                assert send(node.port, scan) == [0]
            sent(node)
    (message,) = listener.heard
    findings = [str(each[5]) for each in message.segments("OBX") if "121071^" in str(each[3])]
    assert findings == ["No"]
    assert not set(str(message)) & set(map(chr, range(0x20))) - {"\r"}
    assert message.segment("NTE")
    patient = message.segment("PID")
    assert str(patient[8]) == "M\\X1C\\"
    assert message.unescape(str(patient[3])).replace("\r", "\n") == values["PatientID"]
    assert message.unescape(str(message.segment("OBR")[18])) == values["AccessionNumber"]


def test_files_are_from_the_configurations_folder_and_tokens_stay_secret(tmp_path: Path) -> None:
    text = f"""
folder = "node"
peers = [{{ ae_title = "{PEER}" }}]
questions = [{{ ask = ["Is there effusion?"] }}]
[[stow]]
url = "https://pacs.example/dicom-web"
token_file = "token"
[stow.tls]
authority = "ca.pem"
"""
    (tmp_path / "listen.toml").write_text(text)
    (stow,) = load_configuration(tmp_path / "listen.toml").stow
    assert stow.token_file == tmp_path / "token"
    assert stow.tls is not None
    assert stow.tls.authority == tmp_path / "ca.pem"
    (tmp_path / "listen.toml").write_text(text.replace("https:", "http:"))
    with pytest.raises(InputError, match="stow") as refused:
        load_configuration(tmp_path / "listen.toml")
    assert "unencrypted" in refused.value.remedy
