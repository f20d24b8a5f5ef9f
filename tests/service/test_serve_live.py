"""The service on a socket: clients that leave, dawdle or send too much; TLS; SIGTERM."""

import contextlib
import json
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
import trustme
from command_line import ROOT, raising
from serving import StandIn, app_over, live, png, upload

from medmoe_edge.bedside.serve import server as serve_server
from medmoe_edge.bedside.serve.settings import Limits, Settings
from medmoe_edge.bundle.bundle import NOTICE
from medmoe_edge.errors import InputError, ResourceError
from medmoe_edge.image.worker import read_apart

ASK = {"question": "Is there effusion?"}


@pytest.fixture
def engine() -> StandIn:
    return StandIn()


@contextlib.contextmanager
def client(url: str, **options: Any) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, trust_env=False, timeout=20, **options) as client:
        yield client


@contextlib.contextmanager
def connected(url: str) -> Iterator[socket.socket]:
    address = urlsplit(url)
    with socket.create_connection((address.hostname, address.port), 20) as connection:
        yield connection


def until(condition: Any) -> None:
    """Wait for something that is about to be."""
    for _ in range(200):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("it did not come")


@pytest.mark.parametrize("stream", ["false", "true"])
def test_when_the_client_leaves_the_model_stops(engine: StandIn, stream: str) -> None:
    read_apart(png())  # what decodes is there, so that the model begins before the client leaves
    engine.may_go_on.clear()
    with live(engine) as url, client(url) as other:
        with client(url, limits=httpx.Limits(max_keepalive_connections=0)) as leaver:
            ask: dict[str, Any] = {"data": {**ASK, "stream": stream}, "files": upload()}
            if stream == "true":
                with leaver.stream("POST", "/v1/ask", **ask) as response:
                    assert next(response.iter_lines()) == "event: token"
            else:
                with pytest.raises(httpx.ReadTimeout):
                    leaver.post("/v1/ask", **ask, timeout=0.5)
        assert engine.begun.wait(10)
        until(lambda: "medmoe_requests_under_way 0.0" in other.get("/metrics").text)
        engine.may_go_on.set()
        assert engine.ended.wait(10)
        assert engine.told == 2  # the word it was at, and none after
        assert other.post("/v1/ask", data=ASK, files=upload()).status_code == 200


def test_who_leaves_the_queue_is_not_answered(engine: StandIn) -> None:
    engine.may_go_on.clear()
    with live(engine) as url, client(url) as first, client(url) as other:
        thread = threading.Thread(
            target=lambda: first.post("/v1/ask", data=ASK, files=upload()), daemon=True
        )
        thread.start()
        assert engine.begun.wait(10)
        with pytest.raises(httpx.ReadTimeout):
            other.post("/v1/ask", data=ASK, files=upload(), timeout=0.3)
        until(lambda: "medmoe_requests_under_way 1.0" in other.get("/metrics").text)
        engine.may_go_on.set()
        thread.join(20)
        assert other.post("/v1/ask", data=ASK, files=upload()).status_code == 200
        assert len(engine.images) == 2


@pytest.mark.parametrize("sent", [b"", b"GET /healthz HTTP/1.1\r\nHost: loc"])
def test_a_head_that_does_not_come_is_not_waited_for(
    engine: StandIn, sent: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve_server, "HEAD_SECONDS", 0.3)
    with live(engine) as url, connected(url) as slow:
        slow.sendall(sent)
        assert slow.recv(100) == b""


def test_a_second_head_that_does_not_come_is_not_waited_for(
    engine: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve_server, "HEAD_SECONDS", 0.5)
    with live(engine) as url, connected(url) as slow:
        slow.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
        answer = b""
        while not answer.endswith(b"}"):
            answer += slow.recv(10_000)
        slow.sendall(b"GET /healthz HTT")
        assert slow.recv(100) == b""


@pytest.mark.parametrize("request_line", ["GET /healthz", "POST /v1/ask?is=not-read"])
def test_the_rest_of_a_body_that_was_answered_is_not_waited_for(
    engine: StandIn, request_line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve_server, "SENDING", 0.5)
    head = f"{request_line} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n"
    with live(engine) as url, connected(url) as slow:
        slow.sendall(head.encode())
        answer = b""
        while not answer.endswith(b"}"):
            answer += slow.recv(10_000)
        slow.sendall(b"x")
        slow.settimeout(4)  # less than uvicorn's own 5 s without a further byte
        assert slow.recv(100) == b""


def test_who_takes_no_answer_is_not_waited_for(
    engine: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve_server, "SENDING", 0.2)
    many = 150
    with live(engine) as url, socket.socket() as idle:
        idle.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        idle.settimeout(20)
        address = urlsplit(url)
        idle.connect((address.hostname, address.port))
        idle.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n" * many)
        time.sleep(3)
        taken = b""
        with contextlib.suppress(ConnectionResetError):
            while more := idle.recv(2**20):
                taken += more
        assert 0 < taken.count(b"HTTP/1.1 200") < many  # else it went on once it was read


def test_a_body_that_does_not_come_is_not_waited_for(engine: StandIn) -> None:
    head = "POST /v1/ask HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n"
    head += "Content-Type: multipart/form-data; boundary=x\r\n\r\n--x\r\n"
    with live(engine, limits=Limits(upload_seconds=1, waiting=0)) as url, connected(url) as slow:
        slow.sendall(head.encode())
        answer = b""
        while more := slow.recv(10_000):
            answer += more
        assert answer.startswith(b"HTTP/1.1 408")
        assert b'"slow_upload"' in answer
        with client(url) as other:
            assert other.post("/v1/ask", data=ASK, files=upload()).status_code == 200


def test_uploads_that_stall_are_in_nobodys_way(engine: StandIn) -> None:
    head = "POST /v1/ask HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n"
    head += "Content-Type: multipart/form-data; boundary=x\r\n\r\n--x\r\n"
    with contextlib.ExitStack() as stack:
        url = stack.enter_context(live(engine, limits=Limits(waiting=0)))
        for _ in range(16):
            stack.enter_context(connected(url)).sendall(head.encode())
        with client(url) as other:
            for _ in range(3):
                assert other.post("/v1/ask", data=ASK, files=upload()).status_code == 200


@pytest.mark.parametrize("announced", [True, False])
def test_too_much_is_refused_while_it_comes(engine: StandIn, announced: bool) -> None:
    with live(engine, limits=Limits(upload_bytes=10_000)) as url, connected(url) as sender:
        length = "Content-Length: 99999999" if announced else "Transfer-Encoding: chunked"
        head = f"POST /v1/ask HTTP/1.1\r\nHost: localhost\r\n{length}\r\n"
        head += "Content-Type: multipart/form-data; boundary=x\r\n\r\n"
        body = b'--x\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n'
        body += bytes(20_000)
        sender.sendall(head.encode() + b"%x\r\n%b\r\n" % (len(body), body))
        assert sender.recv(10_000).startswith(b"HTTP/1.1 413")


def test_tls_is_spoken(engine: StandIn, tmp_path: Path) -> None:
    authority = trustme.CA()
    issued = authority.issue_cert("localhost", "127.0.0.1")
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    issued.cert_chain_pems[0].write_to_path(certificate)
    issued.private_key_pem.write_to_path(key)
    Settings(certificate=certificate, key=key).check_tls()
    trusted = ssl.create_default_context()
    authority.configure_trust(trusted)
    with live(engine, certificate=certificate, key=key) as url:
        assert url.startswith("https://")
        with client(url, verify=trusted) as known:
            assert known.post("/v1/ask", data=ASK, files=upload()).status_code == 200
        with client(url) as stranger, pytest.raises(httpx.ConnectError):
            stranger.get("/healthz")
    with pytest.raises(InputError, match="cannot be used"):
        Settings(certificate=certificate, key=certificate).check_tls()


def test_a_port_that_is_taken_is_told() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ResourceError, match=f"port {port}"):
            serve_server.listening("127.0.0.1", port, "Choose another.")


def test_where_nobody_can_be_told_that_it_listens_it_ends_in_order(
    engine: StandIn, caplog: pytest.LogCaptureFixture
) -> None:
    untold = raising(OSError(28, "No space left on device"))
    with pytest.raises(OSError, match="No space"):
        serve_server.run(app_over(engine), Settings(port=0), untold)
    assert caplog.text == ""


@contextlib.contextmanager
def served(*options: str, log: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The command itself, with nano, and its URL."""
    command = [sys.executable, str(ROOT / "cli.py"), "serve", "--port", "0", "--json", *options]
    with (
        log.open("w") as file,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=file, text=True) as process,
    ):
        try:
            assert process.stdout is not None
            yield process, json.loads(process.stdout.readline())["url"]
        finally:
            process.kill()
            process.wait(20)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_log_that_cannot_be_written_ends_nothing() -> None:
    with served(log=Path("/dev/full")) as (process, url), client(url) as asker:
        assert asker.get("/healthz").status_code == 200
        assert asker.get("/v1/nothing").status_code == 404  # which is logged
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0


def test_what_was_accepted_is_answered_after_sigterm(tmp_path: Path) -> None:
    log, results = tmp_path / "log", list[httpx.Response]()
    with served("--queue", "8", log=log) as (process, url), client(url) as asker:

        def ask(size: int) -> None:
            asked = {"question": "Is Smith ill?", "max_new_tokens": "32"}
            results.append(asker.post("/v1/ask", data=asked, files=upload(png(size, 99))))

        threads = [threading.Thread(target=ask, args=(100 + size,)) for size in range(4)]
        for thread in threads:
            thread.start()
        until(lambda: "medmoe_requests_under_way 4.0" in asker.get("/metrics").text or results)
        process.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join(30)
        assert process.wait(30) == 0
        assert process.stdout is not None
        assert process.stdout.read() == ""  # one line of JSON, and no more
    assert [response.status_code for response in results] == [200] * 4
    assert all(response.json()["answers"][0]["answer"] for response in results)
    told = log.read_text()
    assert NOTICE in told
    assert told.count("POST /v1/ask 200") == 4
    assert "Smith" not in told
