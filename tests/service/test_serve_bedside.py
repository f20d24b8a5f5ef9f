"""The page at a bedside, in Chromium: whose picture it is, series, windows, history, exports."""

import base64
import io
import logging
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as Pillow
from serving import MODEL, StandIn, StandInModality, live, png

pytest.importorskip("selenium", reason="needs selenium")

from browser import DONE, SIZES, TEXT, Page, ask
from dicom_files import ct
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.select import Select

from medmoe_edge.bedside.audit.log import AuditLog
from medmoe_edge.bundle.bundle import NOTICE
from medmoe_edge.contrastive.features import Location
from medmoe_edge.contrastive.heatmap import NO_FINDING
from medmoe_edge.engine.answer import WHY
from medmoe_edge.errors import Notice
from medmoe_edge.image.pixels import Image

LANGUAGES = ["en", "de", "fr", "es", "zh"]
ANSWERED = f"{TEXT} === 'No effusion is seen' && {DONE}"
PASTE = """
const transfer = new DataTransfer();
const data = Uint8Array.from(atob(arguments[0]), (c) => c.charCodeAt(0));
transfer.items.add(new File([data], "image.png"));
dispatchEvent(new ClipboardEvent("paste", { clipboardData: transfer, bubbles: true }));
"""
PINCH = """
const how = { deltaY: -100, ctrlKey: true, bubbles: true, cancelable: true };
document.getElementById("stage").dispatchEvent(new WheelEvent("wheel", how));
"""
# Keeps what is drawn as text, what is saved and what is copied.
OVERHEAR = """
window.drawn = []; window.saved = null; window.copied = null;
const { fillText } = CanvasRenderingContext2D.prototype;
CanvasRenderingContext2D.prototype.fillText = function (text, ...rest) {
  drawn.push(text);
  fillText.call(this, text, ...rest);
};
const { createObjectURL } = URL;
URL.createObjectURL = (blob) => {
  const reader = new FileReader();
  reader.onload = () => (window.saved = reader.result.split(",")[1]);
  reader.readAsDataURL(blob);
  return createObjectURL(blob);
};
navigator.clipboard.writeText = async (text) => { window.copied = text; };
"""
# Of the catalogue: texts that are missing or have other places to fill in, and keys without a text.
CATALOGUE = """
const done = arguments[0];
import("/page/texts.js").then(({ LANGUAGES, TEXTS, QUESTIONS }) => {
  const languages = Object.keys(LANGUAGES);
  const places = (text) => (text.match(/\\{\\w+\\}/g) ?? []).sort().join();
  const questions = Object.values(QUESTIONS).flat().map((row) => [row[0], row]);
  const whole = (row) => row.length === languages.length
    && row.every((text) => text && places(text) === places(row[0]));
  const wrong = [...Object.entries(TEXTS), ...questions].filter(([, row]) => !whole(row));
  const templates = [...document.querySelectorAll("template")].map(({ content }) => content);
  const names = ["text", "title", "placeholder", "ariaLabel"];
  const keys = [document, ...templates].flatMap((root) => [...root.querySelectorAll("*")])
    .flatMap((element) => names.map((name) => element.dataset?.[name])).filter(Boolean);
  const unknown = keys.filter((key) => !(key in TEXTS));
  const warnings = Object.entries(TEXTS).filter(([key]) => key.startsWith("warning."))
    .map(([key, [english]]) => [key.slice(8), english]);
  done([languages, wrong.map(([key]) => key), unknown, keys.length, warnings]);
});
"""
AXE = """
const done = arguments[0];
axe.run().then(({ violations }) =>
  done(violations.map(({ id, nodes }) => [id, nodes.map(({ html }) => html)])));
"""


def doubtful() -> StandIn:
    """Warns of what it answers, and is unsure."""
    engine = StandIn()
    warnings = (
        Notice("unlike_label", "The file says that it is <b>ultrasound</b>."),
        Notice("not_answerable", "The model cannot answer this question from this picture."),
    )
    engine.changes = {"warnings": warnings, "unsure": True, "confidence_kind": "calibrated"}
    return engine


def series(folder: Path) -> list[Path]:
    """Three slices, whose names are in another order than they lie, and two other files."""
    common = {"SeriesInstanceUID": "1.2.1"}
    files = {
        "1.dcm": ct(60, ImagePositionPatient=[0, 0, 5], InstanceNumber=3, **common),
        "2.dcm": ct(-60, ImagePositionPatient=[0, 0, -5], InstanceNumber=1, **common),
        "10.dcm": ct(0, ImagePositionPatient=[0, 0, 0], InstanceNumber=2, **common),
        "other.dcm": ct(90, PatientID="another", **common),
        "readme.txt": b"nothing",
    }
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return [folder / name for name in files]


def turn_to(page: Page, at: int) -> None:
    """Push the slider to a slice, from 0, and wait until it is shown."""
    page.run(
        "const f = document.getElementById('frame'); f.value = arguments[0];"
        "f.dispatchEvent(new Event('input'))",
        at,
    )
    page.until(f"document.getElementById('picture').ariaLabel.includes('frame {at + 1} of ')")


def test_the_patient_and_the_sides_are_shown_and_kept_nowhere(
    page: Page, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, logger="medmoe_edge")
    with live(StandIn()) as url:
        page.open(url)
        page.show(ct(0, 50, PatientBirthDate="19700203", PatientSex="F", StudyDate="20240506"))
        told = page.text("#patient")
        for part in ("Doe, Jane", "MRN-4711", "born 1970-02-03", "female", "study of 2024-05-06"):
            assert part in told
        edges = [page.text(f"#side-{edge}") for edge in ("left", "top", "right", "bottom")]
        assert edges == ["R", "A", "L", "P"]
        assert "left R, top A" in page.run("return document.getElementById('picture').ariaLabel")
        assert page.run("return document.title + localStorage.length + sessionStorage.length") == (
            "medmoe-edge00"
        )
        page.show(png(5, 5))  # nothing of the first patient stays
        assert page.text("#patient") == "No patient stated in the file"
        assert page.text("#side-left") == ""
        assert page.one("#sides-unknown").is_displayed()
        page.drop(b"no image")
        page.until("!document.getElementById('picture-problem').hidden")
        assert not page.one("#patient").is_displayed()
        assert not any("Jane" in address or "4711" in address for address in page.requests())
    assert "Jane" not in caplog.text  # of the service: selenium writes down what it reads
    assert "4711" not in caplog.text


def test_all_frames_come_with_one_upload(page: Page) -> None:
    engine = StandIn()
    with live(engine) as url:
        page.open(url)
        page.show(ct(-80, -40, 0, 40, 80))
        for at, grey in enumerate((26, 77, 128, 178, 229)):
            turn_to(page, at)
            assert abs(page.pixel("picture", 1, 1)[0] - grey) <= 2
        sent = [address for address in page.requests() if address.endswith("/v1/picture")]
        assert len(sent) == 1
        ask(page)
        page.until(ANSWERED)
        assert abs(engine.greys[0] - 229) <= 2  # of the last one, and no other
        turn_to(page, 1)
        assert not page.all(".answer:not([hidden])")
        assert page.one("#empty").is_displayed()


def test_files_of_a_series_are_in_the_order_of_the_body(page: Page, tmp_path: Path) -> None:
    with live(StandIn()) as url:
        page.open(url)
        page.one("#file").send_keys("\n".join(map(str, series(tmp_path))))
        page.until("document.getElementById('frame-shown').value.endsWith('/ 3')")
        for at, grey in enumerate((51, 128, 204)):
            turn_to(page, at)
            assert abs(page.pixel("picture", 1, 1)[0] - grey) <= 1
        said = page.text("#picture-warnings")
        assert "1 files of other series or patients were left out." in said
        assert "1 files could not be read." in said
        sent = [address for address in page.requests() if address.endswith("/v1/picture")]
        assert len(sent) == 5  # each once
        ask(page)
        page.until(ANSWERED)
        assert "Frame3" in page.text(".answer .facts")


def test_windows_are_chosen_by_name(page: Page) -> None:
    with live(StandIn()) as url:
        page.open(url)
        page.show(ct(-600, 400))
        turn_to(page, 0)
        preset = Select(page.one("#preset"))
        names = [option.text for option in preset.options if option.is_enabled()]
        assert ",".join(names) == "Of the file,Full range,Brain,Soft tissue,Lung,Bone,Liver"
        preset.select_by_value("lung")
        assert page.pixel("picture", 1, 1)[0] == 128
        assert page.one("#width").get_property("value") == "1500"
        assert page.one("#display-only").is_displayed()
        turn_to(page, 1)
        assert page.pixel("picture", 1, 1)[0] == 255
        assert page.run("return document.getElementById('preset').value") == "lung"
        preset.select_by_value("own")
        assert not page.one("#display-only").is_displayed()
        page.show(png(5, 5))
        assert len(Select(page.one("#preset")).options) == 3  # no HU, no names for them


def test_zooming_and_moving_change_what_is_seen_alone(page: Page) -> None:
    def layers() -> tuple[float, float, float]:
        matrix = page.run(
            "const { transform } = getComputedStyle(document.getElementById('layers'));"
            "const { a, e, f } = new DOMMatrix(transform); return [a, e, f]"
        )
        return tuple(matrix)

    engine = StandIn()
    with live(engine) as url:
        page.open(url)
        page.show(ct(0, 50))
        assert layers() == (1, 0, 0)
        page.one("#zoom-in").click()
        page.keys(Keys.ARROW_LEFT, "+")
        scale, right, _ = layers()
        assert scale == pytest.approx(1.25**2)
        assert right > 0
        assert page.text("#fit") == "156%"
        stage = page.one("#stage")
        before = page.text("#frame-shown")
        page.run(PINCH)  # as a touchpad tells it
        assert layers()[0] > scale
        assert page.text("#frame-shown") == before
        page.one("#move").click()
        _, right, down = layers()
        ActionChains(page.driver).drag_and_drop_by_offset(stage, 30, 20).perform()
        assert layers()[1:] == pytest.approx((right + 30, down + 20))
        assert page.one("#reset").get_property("disabled")  # the window is the file's still
        ask(page)
        page.until(ANSWERED)
        assert abs(engine.greys[0] - 191) <= 65  # the whole frame, not a part of the screen
        page.one("#fit").click()
        assert layers() == (1, 0, 0)


def test_a_picture_is_pasted(page: Page) -> None:
    with live(StandIn()) as url:
        page.open(url)
        page.run(PASTE, base64.b64encode(png(7, 3)).decode())
        page.until("!document.getElementById('picture').hidden")
        assert page.text("#facts").split()[::2] == ["7", "3"]
        page.run(
            "dispatchEvent(new ClipboardEvent('paste', { clipboardData: new DataTransfer() }))"
        )
        assert page.text("#facts").split()[::2] == ["7", "3"]  # text is pasted where text goes


def test_the_history_leads_back_and_is_in_the_memory_of_the_tab_alone(page: Page) -> None:
    with live(StandIn()) as url:
        page.open(url)
        page.show(ct(0, 50, 90))
        turn_to(page, 2)
        ask(page, "Is it one?")
        page.until(ANSWERED)
        page.show(ct(10, PatientName="Roe^Richard", PatientID="2"))
        ask(page, "Is it two?")
        page.until(ANSWERED)
        page.one("#history-open").click()
        assert page.one("#history").is_displayed()
        assert "this tab only" in page.text("#history")
        patients = [heading.text for heading in page.all("#history-list h3")]
        assert patients == ["Doe, Jane · MRN-4711", "Roe, Richard · 2"]
        page.one("#history-list li button").click()
        page.until("document.getElementById('picture').ariaLabel.endsWith('frame 3 of 3')")
        page.until("document.querySelectorAll('.answer:not([hidden])').length === 1")
        assert page.text(".answer:not([hidden]) .question") == "Is it one?"
        assert "Jane" in page.text("#patient")
        page.one("#history-open").click()
        page.one("#history-forget").click()
        assert page.text("#history-list") == "Nothing was asked yet."
        page.one("#history-close").click()
        assert page.all(".answer") == []
        assert page.text("#history-open") == "History"


def test_what_leaves_the_page_has_notice_and_hash_and_no_patient(page: Page) -> None:
    with live(doubtful()) as url:
        page.open(url)
        page.run(OVERHEAR)
        page.show(ct(0, 50))
        ask(page)
        page.until(ANSWERED)
        buttons = {button.text: button for button in page.all(".answer .actions button")}
        buttons["Copy"].click()
        page.until("window.copied")
        buttons["Save as PNG"].click()
        page.until("window.saved")
        drawn = " ".join(page.run("return window.drawn"))
        lines = page.run("return window.copied").splitlines()
        for text in (drawn, " ".join(lines)):
            for part in (NOTICE, "0" * 64, "Is there effusion?", "ultrasound", "Best guess"):
                assert part in " ".join(text.split())
            assert "Jane" not in text
            assert "4711" not in text
        assert lines[0] == "Warning: The file says that it is <b>ultrasound</b>."
        assert {"R", "A", "L", "P"} <= set(page.run("return window.drawn"))
        saved = Pillow.open(io.BytesIO(base64.b64decode(page.run("return window.saved"))))
        assert saved.format == "PNG"
        grey = page.pixel("picture", 1, 1)[0]
        assert saved.convert("L").getpixel((saved.width // 2, 300)) == pytest.approx(grey, abs=2)


def test_the_history_shows_the_slice_that_was_asked_about(page: Page) -> None:
    engine = StandIn()
    engine.may_go_on.clear()
    with live(engine) as url:
        page.open(url)
        page.show(ct(-90, 0, 90))
        turn_to(page, 2)
        asked = page.pixel("picture", 1, 1)[0]
        ask(page, "Is it three?")
        assert engine.begun.wait(20)
        turn_to(page, 0)
        engine.may_go_on.set()
        page.until("document.getElementById('history-open').textContent.endsWith('1')")
        page.one("#history-open").click()
        page.until("document.querySelector('#history-list img').complete")
        grey = page.run(
            "const small = document.createElement('canvas').getContext('2d');"
            "small.drawImage(document.querySelector('#history-list img'), 0, 0);"
            "return small.getImageData(9, 9, 1, 1).data[0]"
        )
        assert grey == pytest.approx(asked, abs=2)
        assert abs(grey - page.pixel("picture", 1, 1)[0]) > 50
        page.one("#history-close").click()


def test_an_answer_takes_its_own_map_along_or_none(
    page: Page, monkeypatch: pytest.MonkeyPatch
) -> None:
    def locate(self: StandInModality, image: Image, phrase: str) -> Location:
        heat = np.full(image.pixels.shape[:2], -0.5, np.float32)
        at = 0 if phrase == "heart" else -1  # a corner each
        heat[at, at] = 0.75
        return Location({"total": 0.1}, MODEL, phrase, heat, (1, 1), 0.5, self.read())

    def saved(place: int) -> tuple[Pillow.Image, str]:
        """What an answer saves while the last map is on the screen."""
        page.run(OVERHEAR)
        buttons = page.all(f".answer:nth-of-type({place}) .actions button")
        next(each for each in buttons if each.text == "Save as PNG").click()
        page.until("window.saved")
        picture = Pillow.open(io.BytesIO(base64.b64decode(page.run("return window.saved"))))
        return picture.convert("RGB"), " ".join(page.run("return window.drawn"))

    monkeypatch.setattr(StandInModality, "locate", locate)
    with live(StandIn()) as url:
        page.open(url)
        page.until("document.getElementById('locate').getAttribute('aria-disabled') === 'false'")
        page.show(ct(0))
        ask(page)
        page.until(ANSWERED)
        for number, phrase in enumerate(("heart", "lung"), start=2):
            page.one("#question").send_keys(phrase)
            page.one("#locate").click()
            page.until(f"document.querySelectorAll('.answer').length === {number} && {DONE}")
        page.until("!document.getElementById('heat').hidden")
        answer, heart, lung = (saved(place) for place in (1, 2, 3))
        left, right = (100, 20), (700, 620)  # in the corners of the picture, which is 640 high
        for (picture, _), (first, last) in zip(
            (answer, heart, lung), ((False, False), (True, False), (False, True)), strict=True
        ):
            found = [int(np.ptp(np.asarray(picture)[y, x, :3])) > 60 for x, y in (left, right)]
            assert found == [first, last]
        for (_, drawn), phrase in ((heart, "heart"), (lung, "lung")):
            for part in (f"Phrase: {phrase}", "-0.50 least alike", "most alike 0.75"):
                assert part in drawn
            assert NO_FINDING in drawn
        assert "Phrase" not in answer[1]
        assert "least alike" not in answer[1]


def test_warnings_come_first_and_details_are_folded_away(page: Page) -> None:
    with live(doubtful()) as url:
        page.open(f"{url}/#de")
        page.show(ct(0))
        ask(page)
        page.until(ANSWERED)
        parts = page.run(
            "return [...document.querySelector('.answer').children].map((e) => e.className)"
        )
        assert parts[:3] == ["question", "warnings problem", "said"]
        assert [warning.text for warning in page.all(".warnings li")][-2:] == [
            "Warnung: The file says that it is <b>ultrasound</b>.",
            "Warnung: Das Modell kann diese Frage anhand dieses Bildes nicht beantworten.",
        ]
        assert page.text(".said").startswith("Unsicher. Beste Vermutung: No effusion")
        size = "return parseFloat(getComputedStyle(document.querySelector(arguments[0])).fontSize)"
        assert page.run(size, ".warnings") > page.run(size, "details")
        assert page.text(".answer summary").startswith("Chance, richtig zu sein: 93")
        assert not page.one(".answer details").get_property("open")
        assert page.contrast(".answer .warnings li") >= 4.5


def test_examples_fit_the_modality(page: Page) -> None:
    engine = StandIn()
    with live(engine) as url:
        page.open(f"{url}/#fr")
        page.one("#examples-toggle").click()
        kinds = page.text("#examples ul")
        page.show(ct(0, 50))
        assert page.text("#examples ul") != kinds
        assert "Is there hemorrhage? Y a-t-il une hémorragie" in page.text("#examples ul")
        page.one("#examples button").click()
        page.until(ANSWERED)
        assert page.text(".answer .question") == "Which organ is shown?"  # English, as it is read
        assert not page.one("#examples").is_displayed()


def test_the_catalogue_is_whole(page: Page) -> None:
    with live(StandIn()) as url:
        page.open(url)
        names, wrong, unknown, count, warnings = page.driver.execute_async_script(CATALOGUE)
        assert names == LANGUAGES
        assert wrong == []
        assert unknown == []
        assert count > 30
        assert WHY.items() <= dict(warnings).items()  # in the service's own words


@pytest.mark.parametrize("size", SIZES)
def test_every_language_fits(page: Page, size: tuple[int, int]) -> None:
    page.size(*size)
    with live(StandIn()) as url:
        page.open(url)
        page.show(ct(0, 50, StudyDescription="CT Thorax nativ und mit Kontrastmittel"))
        ask(page)
        page.until(ANSWERED)
        notices = set()
        for code in LANGUAGES:
            Select(page.one("#language")).select_by_value(code)
            assert page.run("return document.documentElement.lang") == code
            notices.add(page.text("#notice"))
            for side in ("Width", "Height"):
                whole, seen = (
                    page.run(f"return document.documentElement.{part}{side}")
                    for part in ("scroll", "client")
                )
                assert whole <= seen, code
            for selector in (
                "#notice",
                "#patient",
                "#question",
                "#send",
                "#locate",
                "#history-open",
            ):
                box = page.run(
                    "return document.querySelector(arguments[0]).getBoundingClientRect()", selector
                )
                assert box["left"] >= 0
                assert box["right"] <= size[0], (code, selector)
                assert box["bottom"] <= size[1], (code, selector)
        assert len(notices) == 5
        assert "概率" in page.text(".answer summary")  # what was answered before, too
        assert page.run("return location.hash") == "#zh"
        assert page.run("return localStorage.length + sessionStorage.length") == 0


def test_the_page_says_what_the_service_keeps(page: Page, tmp_path: Path) -> None:
    with live(StandIn()) as url:
        page.open(url)
        page.until("document.getElementById('kept').textContent")
        assert page.text("#kept") == "The service keeps none of them."
    with live(StandIn(), audit=AuditLog(tmp_path / "audit.jsonl")) as url:
        page.open(url)
        page.until("document.getElementById('kept').textContent")
        assert "audit log" in page.text("#kept")


@pytest.mark.parametrize(
    ("size", "scheme"), list(zip(SIZES, ("light", "dark", "light"), strict=True))
)
def test_axe_finds_nothing(page: Page, size: tuple[int, int], scheme: str) -> None:
    axe_core = pytest.importorskip("axe_core_python", reason="needs axe-core-python")
    script = (Path(axe_core.__file__).parent / "axe.min.js").read_text("utf-8")
    page.size(*size, scheme=scheme)
    with live(doubtful()) as url:
        page.open(url)
        page.until("document.getElementById('model').textContent")
        page.run(script)
        assert page.driver.execute_async_script(AXE) == []
        page.show(ct(0, 50))
        ask(page)
        page.until(ANSWERED)
        page.run("document.querySelector('.answer details').open = true")
        page.one("#examples-toggle").click()
        assert page.driver.execute_async_script(AXE) == []
        page.one("#history-open").click()
        assert page.driver.execute_async_script(AXE) == []
        page.one("#history-close").click()
