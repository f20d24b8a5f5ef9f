"""The service in this process, over stand-ins: what it answers, refuses, logs and counts."""

import base64
import contextlib
import gzip
import io
import json
import logging
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import Run, raising, two_lines
from fastapi import FastAPI
from PIL import Image as Pillow
from serving import MODEL, StandIn, app_over, client_of, png, upload, work_over
from starlette.testclient import TestClient

from medmoe_edge.bedside.audit.log import AuditLog, verify_log
from medmoe_edge.bedside.serve.errors import Refusal
from medmoe_edge.bedside.serve.guard import Logins
from medmoe_edge.bedside.serve.settings import Limits, Settings, read_tokens
from medmoe_edge.bedside.serve.work import Upload
from medmoe_edge.bundle.bundle import NOTICE
from medmoe_edge.errors import BundleError, InputError, ResourceError
from medmoe_edge.image.pixels import Image
from medmoe_edge.image.worker import read_apart

ASK = {"question": "Is there effusion?"}


@pytest.fixture
def engine() -> StandIn:
    return StandIn()


@pytest.fixture
def client(engine: StandIn) -> Iterator[TestClient]:
    limits = Limits(upload_bytes=10**5, pixels=10_000, questions=2, new_tokens=32)
    with client_of(app_over(engine, limits=limits)) as client:
        yield client


def error_of(response: Any, status: int) -> dict[str, str]:
    assert response.status_code == status, response.text
    assert list(response.json()) == ["error"]
    error = response.json()["error"]
    assert list(error) == ["message", "remedy", "type", "code"]
    assert all(isinstance(text, str) and text for text in error.values())
    return dict(error)


def events_of(text: str) -> list[tuple[str, Any]]:
    events = []
    for block in text.split("\n\n")[:-1]:
        name, data = block.split("\n")
        events.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return events


# --- answers ----------------------------------------------------------------------------------


def test_questions_are_answered_in_their_order(client: TestClient, engine: StandIn) -> None:
    asked = {"question": ["Is there effusion?", "Where?"], "max_new_tokens": "2"}
    response = client.post("/v1/ask", data=asked, files=upload(png(20, 10)))
    assert response.status_code == 200
    answers = response.json()["answers"]
    assert [answer["question"] for answer in answers] == asked["question"]
    assert answers[0]["answer"] == "No effusion"
    assert (answers[0]["complete"], answers[0]["notice"]) == (False, NOTICE)
    assert engine.images == [(10, 20, 3)]


def test_answers_may_be_given_to_choose_from(client: TestClient, engine: StandIn) -> None:
    asked = {"question": ["Is there effusion?", "Where?"]}
    given: dict[str, Any] = {**asked, "choices": ["left", "right"]}
    assert client.post("/v1/ask", data=given, files=upload()).status_code == 200
    yes_no = {**asked, "yes_no": "true"}
    assert client.post("/v1/ask", data=yes_no, files=upload()).status_code == 200
    assert client.post("/v1/ask", data=asked, files=upload()).status_code == 200
    assert engine.choices == [("left", "right"), {"Is there effusion?": ("Yes", "No")}, {}]
    wrong = {**asked, "choices": ["left"]}
    error = error_of(client.post("/v1/ask", data=wrong, files=upload()), 400)
    assert "fewer than two" in error["message"]


def test_answers_are_streamed(client: TestClient) -> None:
    asked = {"question": ["Is there effusion?", "Where?"], "stream": "true"}
    response = client.post("/v1/ask", data=asked, files=upload())
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    events = events_of(response.text)
    assert [name for name, _ in events] == [*["token"] * 4, "answer"] * 2 + ["done"]
    for index in (0, 1):
        told = [data["text"] for name, data in events if name == "token" and data["index"] == index]
        assert "".join(told) == "No effusion is seen"
    assert [data["answer"] for name, data in events if name == "answer"] == ["".join(told)] * 2


def test_a_failure_within_a_stream_is_its_last_event(client: TestClient, engine: StandIn) -> None:
    engine.error = BundleError("The model is no good.", "Export it again.")
    response = client.post("/v1/ask", data={**ASK, "stream": "true"}, files=upload())
    events = events_of(response.text)
    assert [name for name, _ in events] == ["token", "error"]
    assert events[-1][1]["error"]["message"] == "The model is no good."


def test_labels_are_chosen_among(client: TestClient) -> None:
    response = client.post("/v1/classify", data={"label": ["mass", "none"]}, files=upload())
    assert response.json()["scores"] == {"mass": 0.5, "none": 0.5}
    assert response.json()["notice"] == NOTICE


def test_a_place_is_a_picture_or_json_with_it(client: TestClient) -> None:
    image = upload(png(6, 4))
    as_json = client.post("/v1/locate", data={"phrase": "mass"}, files=image).json()
    assert (as_json["peak"], as_json["size"], as_json["notice"]) == ([0, 0], [6, 4], NOTICE)
    response = client.post("/v1/locate", data={"phrase": "mass", "format": "png"}, files=image)
    assert response.headers["content-type"] == "image/png"
    assert base64.b64decode(as_json["heat_png"]) == response.content
    picture = Pillow.open(io.BytesIO(response.content))
    assert (picture.mode, picture.size, picture.info["Comment"]) == ("L", (6, 4), NOTICE)
    assert (picture.getpixel((0, 0)), picture.getpixel((1, 0))) == (255, 0)


@pytest.mark.parametrize(("path", "asked"), [("classify", "label"), ("locate", "phrase")])
def test_without_a_modality_model_only_questions_are_answered(path: str, asked: str) -> None:
    with client_of(app_over(StandIn(), modality=False)) as client:
        error = error_of(client.post(f"/v1/{path}", data={asked: "x"}, files=upload()), 503)
        assert error["code"] == "no_model"
        assert client.post("/v1/ask", data=ASK, files=upload()).status_code == 200


def test_every_answer_is_audited_before_it_is_given(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    with client_of(app_over(StandIn(), audit=AuditLog(path))) as client:
        client.post("/v1/ask", data=ASK, files=upload())
        client.post("/v1/classify", data={"label": "mass"}, files=upload())
        client.post("/v1/locate", data={"phrase": "mass"}, files=upload())
        entries = [json.loads(line) for line in path.read_text().splitlines()]
        events = [entry["event"] for entry in entries]
        assert events == ["accepted", "ask", "classify", "locate"]
        assert (entries[0]["question"], entries[0]["answer"]) == (ASK["question"], "")
        assert entries[1]["answer"] == "No effusion is seen"
        assert entries[1]["model"] == MODEL
        path.write_text("changed\n")
        error = error_of(client.post("/v1/ask", data=ASK, files=upload()), 503)
        assert "effusion" not in json.dumps(error)


def test_no_word_is_told_before_its_record_is_kept(tmp_path: Path) -> None:
    """A stream that is left after its first word has its record, with what was told."""
    path = tmp_path / "audit.jsonl"
    engine = StandIn()
    engine.may_go_on.clear()
    work = work_over(engine, AuditLog(path))
    picture = Image(np.zeros((8, 8, 3), np.uint8))
    told = work.ask(Upload(picture, "0" * 64, "ward@10.0.0.1", 9.0), ["Is there effusion?"], 9)
    assert next(told) == "No"
    assert [json.loads(line)["event"] for line in path.read_text().splitlines()] == ["accepted"]
    told.close()
    accepted, aborted = map(json.loads, path.read_text().splitlines())
    assert (aborted["event"], aborted["answer"], aborted["who"]) == (
        "aborted",
        "No",
        "ward@10.0.0.1",
    )
    assert accepted["question"] == aborted["question"] == "Is there effusion?"


def test_what_fails_half_way_is_recorded_too(tmp_path: Path) -> None:
    path, engine = tmp_path / "audit.jsonl", StandIn()
    engine.error = BundleError("The model is no good.", "Export it again.")
    with client_of(app_over(engine, audit=AuditLog(path))) as client:
        client.post("/v1/ask", data={**ASK, "stream": "true"}, files=upload())
    events = [json.loads(line)["event"] for line in path.read_text().splitlines()]
    assert events == ["accepted", "aborted"]


def test_a_service_that_cannot_audit_is_not_ready(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "audit.jsonl"
    with client_of(app_over(StandIn(), audit=AuditLog(log))) as client:
        assert client.get("/readyz").status_code == 200
        log.write_text("changed\n")
        assert error_of(client.get("/readyz"), 503)["code"] == "no_resources"
        log.unlink()
        full = shutil.disk_usage(tmp_path)._replace(free=1000)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: full)
        assert error_of(client.get("/readyz"), 503)["code"] == "no_resources"
        assert client.head("/healthz").status_code == 200


def test_a_service_whose_audit_log_was_moved_away_with_its_folder_is_not_ready(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "logs"
    folder.mkdir()
    log = AuditLog(folder / "audit.jsonl")
    texts = ("who", "event", "question", "answer", "input_sha256")
    entry: dict[str, Any] = {"model": {}, **dict.fromkeys(texts, "")}
    log.append(**entry)
    with client_of(app_over(StandIn(), audit=log)) as client:
        folder.rename(tmp_path / "away")
        assert error_of(client.get("/readyz"), 503)["code"] == "no_resources"
        with pytest.raises(ResourceError, match="its folder is gone"):
            log.append(**entry)
        assert not folder.exists()
        (tmp_path / "away").rename(folder)
        assert client.get("/readyz").status_code == 200
        log.append(**entry)
    assert verify_log(log.path).entries == 2


def test_an_audit_log_in_no_folder_is_refused_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="gone, where the audit log is to be, is not a folder"):
        AuditLog(tmp_path / "gone" / "audit.jsonl")


def test_an_upload_leaves_no_file_and_its_name_is_nothing(
    client: TestClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for name in ("../../escaped.png", "/etc/passwd", "Smith^John.dcm", "a\\..\\b", "\0", "x" * 999):
        assert client.post("/v1/ask", data=ASK, files=upload(name=name)).status_code == 200
        error = error_of(client.post("/v1/ask", data=ASK, files=upload(b"no", name)), 400)
        assert error["message"] == "The image is not an image that can be read."
    assert list(tmp_path.iterdir()) == []


def test_uploads_are_read_as_files_are(scan: Path) -> None:
    assert read_apart(scan.read_bytes(), None).pixels.shape == (8, 8, 3)
    with pytest.raises(InputError, match="The image has 1 frame; there is no frame 3"):
        read_apart(scan.read_bytes(), 3)


# --- refusals ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "image", "status", "code"),
    [
        (ASK, b"", 400, "bad_image"),
        (ASK, b"no image", 400, "bad_image"),
        (ASK, png()[:40], 400, "bad_image"),
        (ASK, png(101, 100), 400, "bad_image"),  # more pixels than allowed
        (ASK, png() + bytes(10**5), 413, "too_large"),
        ({**ASK, "frame": "7"}, png(), 400, "bad_image"),
        ({**ASK, "frame": "-1"}, png(), 422, "invalid_request"),
        ({**ASK, "frame": "9" * 50}, png(), 400, "bad_image"),
        ({**ASK, "max_new_tokens": "33"}, png(), 400, "too_many_tokens"),
        ({**ASK, "max_new_tokens": "0"}, png(), 422, "invalid_request"),
        ({"question": ["a", "b", "c"]}, png(), 400, "too_many_questions"),
        ({"question": " "}, png(), 400, "bad_input"),
        ({"question": "why" * 5000}, png(), 422, "invalid_request"),
        ({"question": "w" * 70_000}, png(), 400, "bad_request"),
        ({}, png(), 422, "invalid_request"),
        ({**ASK, "Smith": "x"}, png(), 422, "invalid_request"),
        (ASK, None, 422, "invalid_request"),
    ],
)
def test_what_cannot_be_answered_is_refused(
    client: TestClient, data: dict[str, Any], image: bytes | None, status: int, code: str
) -> None:
    files = {"image": ("Smith.png", b"" if image is None else image)}
    files = {"other": files["image"]} if image is None else files
    response = client.post("/v1/ask", data=data, files=files)
    error = error_of(response, status)
    assert error["code"] == code
    assert "Smith" not in json.dumps(error)


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"", "multipart/form-data"),
        (b"", "multipart/form-data; boundary="),
        (b"--x\r\nContent-Disposition: form-data\r\n\r\nSmith", "multipart/form-data; boundary=x"),
        (b"\xff" * 100, "multipart/form-data; boundary=x"),
        (b"{}", "application/json"),
        (b"question=Smith", "application/x-www-form-urlencoded"),
    ],
)
def test_broken_forms_are_refused(client: TestClient, content: bytes, kind: str) -> None:
    response = client.post("/v1/ask", content=content, headers={"content-type": kind})
    assert response.status_code in (400, 422)
    assert "Smith" not in json.dumps(error_of(response, response.status_code))


@pytest.mark.parametrize("route", ["/v1/ask", "/v1/chat/completions"])
def test_a_packed_body_is_refused_as_such(client: TestClient, route: str) -> None:
    for encoding in ("gzip", "Zstd, gzip"):
        headers = {"content-encoding": encoding, "content-type": "application/json"}
        response = client.post(route, content=gzip.compress(b"{}"), headers=headers)
        assert error_of(response, 415)["code"] == "unsupported_encoding"
        assert response.headers["accept-encoding"] == "identity"
    headers = {"content-encoding": "identity"}
    assert client.post("/v1/ask", data=ASK, files=upload(), headers=headers).status_code == 200


@pytest.mark.parametrize(
    ("route", "twice"),
    [("ask", "max_new_tokens"), ("ask", "frame"), ("seen", "frame"), ("picture", "frame")],
)
def test_a_field_that_is_there_twice_is_refused(client: TestClient, route: str, twice: str) -> None:
    """One of the two would be ignored, and the answer be about another frame than was meant."""
    given: dict[str, Any] = {"question": ["a?", "b?"]} if route == "ask" else {}
    assert client.post(f"/v1/{route}", data=given, files=upload()).status_code == 200
    response = client.post(f"/v1/{route}", data=given | {twice: ["0", "1"]}, files=upload())
    assert error_of(response, 422)["message"] == f"{twice} is there 2 times."


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (ResourceError("The disk is full.", "Free some space."), 503, "no_resources"),
        (BundleError("Not finite.", "Export again."), 500, "model_failed"),
        (MemoryError(), 503, "no_resources"),
        (ZeroDivisionError("Smith^John"), 500, "unexpected"),
    ],
)
def test_failures_of_ours_are_told_without_the_patient(
    client: TestClient,
    engine: StandIn,
    caplog: pytest.LogCaptureFixture,
    error: Exception,
    status: int,
    code: str,
) -> None:
    engine.error = error
    found = error_of(client.post("/v1/ask", data=ASK, files=upload()), status)
    assert (found["code"], found["type"]) == (code, "server_error")
    assert "Smith" not in found["message"] + found["remedy"] + caplog.text
    engine.error = None
    assert client.post("/v1/ask", data=ASK, files=upload()).status_code == 200


def test_unknown_routes_and_methods_are_refused_alike(client: TestClient) -> None:
    assert error_of(client.get("/v1/patients/Smith"), 404)["code"] == "not_found"
    assert error_of(client.get("/v1/ask"), 405)["code"] == "method_not_allowed"
    assert error_of(client.post("/v1/nothing"), 404)["type"] == "not_found_error"


@pytest.mark.parametrize(
    "host", ["evil.example", "localhost.evil.example", "[::1", "", "127.0.0.2"]
)
def test_other_hosts_are_refused_on_this_machine(client: TestClient, host: str) -> None:
    assert error_of(client.get("/v1/models", headers={"host": host}), 421)["code"] == "wrong_host"


@pytest.mark.parametrize("host", ["localhost", "localhost:8000", "127.0.0.1:1", "[::1]:8000"])
def test_this_machine_has_three_names(client: TestClient, host: str) -> None:
    assert client.get("/v1/models", headers={"host": host}).status_code == 200


def test_pages_of_other_sites_are_refused(client: TestClient) -> None:
    for origin in ("http://evil.example", "null", "http://localhost:1", "http://[x"):
        response = client.post("/v1/ask", data=ASK, files=upload(), headers={"origin": origin})
        assert error_of(response, 403)["code"] == "wrong_origin"
    own = {"origin": "http://localhost"}
    response = client.post("/v1/ask", data=ASK, files=upload(), headers=own)
    assert response.status_code == 200
    assert "access-control-allow-origin" not in response.headers


def test_only_the_token_opens() -> None:
    token = "0123456789abcdef"
    right = f"Bearer {token}"

    def app() -> FastAPI:
        return app_over(StandIn(), token=token, host="0.0.0.0", proxy="10.0.0.1")

    for path in ("/v1/models", "/metrics", "/v1/nothing"):
        with client_of(app()) as client:  # a new one: too many wrong tokens are another refusal
            for wrong in ("", "Bearer", "Bearer ", f"Basic {token}", f"{right}x", "Bearer \xe9"):
                response = client.get(path, headers=[(b"authorization", wrong.encode("latin-1"))])
                assert error_of(response, 401)["type"] == "authentication_error"
                assert response.headers["www-authenticate"] == "Bearer"
    with client_of(app()) as client:
        headers = {"authorization": right.lower(), "host": "edge.hospital.example"}
        assert client.get("/v1/models", headers=headers).status_code == 200
        assert client.get("/healthz").status_code == 200
        assert client.post("/v1/ask", data=ASK, files=upload(), headers=headers).status_code == 200


def test_who_guesses_tokens_has_to_wait(caplog: pytest.LogCaptureFixture) -> None:
    with client_of(app_over(StandIn(), token="0123456789abcdef")) as client:
        for _ in range(Logins.most):
            error_of(client.get("/v1/models"), 401)
        right = {"authorization": "Bearer 0123456789abcdef"}
        response = client.get("/v1/models", headers=right)
        assert error_of(response, 429)["code"] == "too_many_logins"
        assert 0 < int(response.headers["retry-after"]) <= Logins.seconds
        assert client.get("/healthz").status_code == 200
    assert sum("no token, or a wrong one" in text for text in caplog.messages) == Logins.most


def test_who_guesses_tokens_has_to_wait_even_where_the_log_cannot_say_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    logins = Logins()
    monkeypatch.setattr(logging.getLogger(Logins.__module__), "handle", raising(OSError(28, "")))
    for _ in range(Logins.most):
        logins.check("10.0.0.1")
        with contextlib.suppress(OSError):
            logins.failed("10.0.0.1")
    with pytest.raises(Refusal, match="too many wrong tokens"):
        logins.check("10.0.0.1")


def test_pages_of_named_origins_may_ask() -> None:
    origin = "https://viewer.example:8443"
    with client_of(app_over(StandIn(), cors_origins=(origin,))) as client:
        asked = {"access-control-request-method": "POST", "origin": origin}
        assert client.options("/v1/ask", headers=asked).status_code == 200
        response = client.post("/v1/ask", data=ASK, files=upload(), headers={"origin": origin})
        assert response.headers["access-control-allow-origin"] == origin
        other = {"origin": "https://evil.example"}
        error_of(client.post("/v1/ask", data=ASK, files=upload(), headers=other), 403)
    with pytest.raises(InputError, match="not the origin"):
        Settings(cors_origins=("*",))


def test_the_busy_say_when_to_come_back(engine: StandIn) -> None:
    engine.may_go_on.clear()
    with client_of(app_over(engine, limits=Limits(waiting=1))) as client:
        codes: list[int] = []

        def ask() -> None:
            codes.append(client.post("/v1/ask", data=ASK, files=upload()).status_code)

        threads = [threading.Thread(target=ask) for _ in range(2)]
        for thread in threads:
            thread.start()
        assert engine.begun.wait(10)
        while "medmoe_requests_under_way 2.0" not in client.get("/metrics").text:
            assert any(thread.is_alive() for thread in threads)
        response = client.post("/v1/ask", data=ASK, files=upload())
        assert error_of(response, 429)["type"] == "rate_limit_error"
        assert int(response.headers["retry-after"]) >= 1
        assert client.get("/readyz").status_code == 200
        engine.may_go_on.set()
        for thread in threads:
            thread.join(20)
        assert codes == [200, 200]
        assert client.post("/v1/ask", data=ASK, files=upload()).status_code == 200


def test_an_answer_that_takes_too_long_is_given_up(engine: StandIn) -> None:
    engine.may_go_on.clear()
    with client_of(app_over(engine, limits=Limits(seconds=1))) as client:
        error = error_of(client.post("/v1/ask", data=ASK, files=upload()), 504)
        assert error["code"] == "timeout"
        engine.may_go_on.set()
        assert engine.ended.wait(10)
        assert engine.told == 2  # the one it was at, and none after
        assert client.post("/v1/ask", data=ASK, files=upload()).status_code == 200


# --- what is told about it --------------------------------------------------------------------


def test_the_log_tells_nothing_that_was_sent(
    client: TestClient, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    question = {"question": "Is Smith ill?"}
    assert client.post("/v1/ask", data=question, files=upload()).status_code == 200
    refused = client.post("/v1/ask?patient=Smith", data=question, files=upload())
    assert error_of(refused, 400)["code"] == "unsupported_parameter"
    client.get("/Smith?id=1", headers={"user-agent": "Smith"})
    client.request("SMITH", "/healthz")
    lines = [
        record for record in caplog.records if record.name == "medmoe_edge.bedside.serve.guard"
    ]
    told = [line.getMessage().rpartition(" ms")[0].rpartition(" ")[0] for line in lines]
    assert told == [
        "POST /v1/ask 200",
        "POST /v1/ask 400",
        "GET (unknown) 404",
        "(other) /healthz 405",
    ]
    ours = [record for record in caplog.records if not record.name.startswith("httpx")]
    assert not any("smith" in record.getMessage().lower() for record in ours)
    assert "smith" not in client.get("/metrics").text.lower()


def test_what_is_refused_before_it_is_routed_is_counted_under_its_route(engine: StandIn) -> None:
    asked = {
        "/v1/ask": "/v1/ask",
        "/v1/models/x": "/v1/models/{name}",
        "/api/chat": "/api/chat",
        "/v1/x": "(unknown)",
    }
    token = "s" * 16
    with client_of(app_over(engine, token=token)) as client:
        for path in asked:
            error_of(client.post(path), 401)
        text = client.get("/metrics", headers={"Authorization": f"Bearer {token}"}).text
    for route in asked.values():
        assert f'medmoe_requests_total{{route="{route}",status="401"}} 1.0' in text


def test_metrics_count_requests_and_answers(client: TestClient) -> None:
    client.post("/v1/ask", data={"question": ["a", "b"]}, files=upload())
    client.post("/v1/ask", data=ASK, files=upload(b"no"))
    text = client.get("/metrics").text
    assert 'medmoe_requests_total{route="/v1/ask",status="200"} 1.0' in text
    assert 'medmoe_requests_total{route="/v1/ask",status="400"} 1.0' in text
    assert 'medmoe_answers_total{prefix_reused="false"} 2.0' in text
    assert "medmoe_answer_tokens_total 2.0" in text
    assert "process_resident_memory_bytes" in text


def test_every_response_keeps_browsers_in_check(client: TestClient) -> None:
    for response in (client.get("/healthz"), client.get("/no"), client.post("/v1/ask")):
        assert response.headers["x-content-type-options"] == "nosniff"
        assert response.headers["cache-control"] == "no-store"
        assert "frame-ancestors 'none'" in response.headers["content-security-policy"]
        assert "server" not in response.headers


def test_health_and_readiness(client: TestClient) -> None:
    assert client.get("/healthz").json() == {"status": "ok"}
    assert client.get("/readyz").json() == {"status": "ready", "notice": NOTICE}
    app = app_over(StandIn())
    stopped = TestClient(app, base_url="http://localhost")  # whose worker was never started
    assert error_of(stopped.get("/readyz"), 503)["code"] == "not_ready"


def test_models_are_listed(client: TestClient) -> None:
    first, second = client.get("/v1/models").json()["data"]
    assert (first["id"], first["kind"], first["verification"]) == ("stand-in", "med-moe", "passed")
    assert (second["id"], second["kind"]) == ("stand-in-modality", "medmoe")


# --- how it is started ------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.7", "::", "edge.hospital.example"])
def test_others_need_a_token(host: str) -> None:
    with pytest.raises(InputError, match="token"):
        Settings(host=host)
    tokens = {"ward": "0123456789abcdef"}
    with pytest.raises(InputError, match="unencrypted"):
        Settings(host=host, tokens=tokens)
    assert not Settings(host=host, tokens=tokens, proxy="10.0.0.1").is_local
    with pytest.raises(InputError, match="Through a proxy"):
        Settings(proxy="10.0.0.1")


def test_behind_a_proxy_hosts_are_its_own() -> None:
    with client_of(app_over(StandIn(), token="0123456789abcdef", proxy="10.0.0.1")) as client:
        headers = {"authorization": "Bearer 0123456789abcdef", "host": "edge.hospital.example"}
        headers |= {"origin": "https://edge.hospital.example:443"}
        assert client.post("/v1/ask", data=ASK, files=upload(), headers=headers).status_code == 200


def test_a_token_is_in_no_repr() -> None:
    assert "0123456789abcdef" not in repr(Settings(tokens={"ward": "0123456789abcdef"}))


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o777])
def test_a_token_that_others_may_read_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "token"
    path.write_text("0123456789abcdef\n")
    path.chmod(mode)
    with pytest.raises(InputError, match="Others"):
        read_tokens(path)
    path.chmod(0o600)
    assert read_tokens(path) == {"token": "0123456789abcdef"}
    path.write_text("# who may ask\nward-3 0123456789abcdef\npacs   fedcba9876543210\n")
    assert read_tokens(path) == {"ward-3": "0123456789abcdef", "pacs": "fedcba9876543210"}


@pytest.mark.parametrize(
    "text",
    [
        *(b"", b"short", b"with space in the middle", b"\xff" * 40, b"x" * 2000),
        *(b"a 0123456789abcdef\na 1123456789abcdef", b"a 0123456789abcdef\nb 0123456789abcdef"),
        *(b"a 0123456789abcdef\n1123456789abcdef", b"/ 0123456789abcdef"),
    ],
)
def test_a_poor_token_is_refused(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "token"
    path.write_bytes(text)
    path.chmod(0o600)
    with pytest.raises(InputError, match="token file"):
        read_tokens(path)


def test_bad_starts_are_two_lines(run: Run, tmp_path: Path) -> None:
    (tmp_path / "open").write_text("0123456789abcdef")
    (tmp_path / "open").chmod(0o644)
    (tmp_path / "closed").write_text("0123456789abcdef")
    (tmp_path / "closed").chmod(0o600)
    (tmp_path / "no.pem").write_text("no certificate")
    for arguments, code in (
        (["--host", "0.0.0.0"], 2),
        (["--token-file", "open"], 2),
        (["--token-file", "missing"], 2),
        (["--tls-cert", "no.pem"], 2),
        (["--tls-cert", "no.pem", "--tls-key", "no.pem"], 2),
        (["--port", "70000"], 2),
        (["--host", "a..b", "--token-file", "closed", "--behind-proxy", "127.0.0.1"], 2),
        (["--model", "nanno"], 3),
    ):
        result = run("serve", *arguments)
        assert result.exit_code == code, result.stderr
        assert two_lines(result)
