"""For the tests of the page: Chromium without a screen, and what a person does with it."""

import base64
import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

SIZES = [(1024, 600), (390, 844), (1440, 900)]
DONE = "[...document.querySelectorAll('.answer')].at(-1)?.getAttribute('aria-busy') === null"
TEXT = "document.querySelector('.answer:last-child .text')?.textContent"
SECONDS = 60  # for anything to happen
FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--disable-dev-shm-usage", "--disable-extensions", "--no-default-browser-check"),
)
DROP = """
const [data, name] = arguments;
const transfer = new DataTransfer();
transfer.items.add(new File([Uint8Array.from(atob(data), (c) => c.charCodeAt(0))], name));
window.dropped = performance.now();
const drop = { dataTransfer: transfer, bubbles: true, cancelable: true };
document.getElementById("stage").dispatchEvent(new DragEvent("drop", drop));
"""
# WCAG 2.2: the relative luminance of sRGB, and the contrast of two of them
CONTRAST = """
const luminance = (colour) => {
  const [r, g, b] = colour.match(/[\\d.]+/g).map((v) => v / 255)
    .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const behind = (element) => {
  const colour = getComputedStyle(element).backgroundColor;
  return /, 0\\)$/.test(colour) ? behind(element.parentElement) : colour;
};
const [dark, light] = [getComputedStyle(arguments[0]).color, behind(arguments[0])]
  .map(luminance).sort((a, b) => a - b);
return (light + 0.05) / (dark + 0.05);
"""


class Page:
    """The service's page in a browser."""

    def __init__(self, driver: webdriver.Chrome) -> None:
        self.driver = driver

    def open(self, url: str) -> None:
        """Load it anew; what was logged before is forgotten."""
        self.driver.get("about:blank")
        self.logged("browser")
        self.logged("performance")
        self.driver.get(url)

    def one(self, selector: str) -> WebElement:
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def all(self, selector: str) -> list[WebElement]:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def run(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def until(self, script: str, *arguments: Any) -> Any:
        """Wait for a JavaScript expression to be true, and give it."""
        wait = WebDriverWait(self.driver, SECONDS, poll_frequency=0.02)
        return wait.until(lambda _: self.run(f"return {script}", *arguments), script)

    def drop(self, data: bytes, name: str = "scan.png") -> None:
        """Drop a file on the stage."""
        self.run(DROP, base64.b64encode(data).decode(), name)

    def show(self, data: bytes) -> None:
        """Drop an image, and wait until it is there."""
        self.drop(data)
        self.until("!document.getElementById('picture').hidden")
        self.until("!document.getElementById('stage').hasAttribute('aria-busy')")

    def keys(self, *keys: str, held: str = "") -> None:
        """Type into whatever has the focus, while another key is held down."""
        chain = ActionChains(self.driver)
        if held:
            chain.key_down(held).send_keys(*keys).key_up(held).perform()
        else:
            chain.send_keys(*keys).perform()

    def focused(self) -> str:
        """The id of what has the focus."""
        return str(self.run("return document.activeElement.id"))

    def text(self, selector: str) -> str:
        """What is there to be read, also where it is only read aloud."""
        return str(self.run("return document.querySelector(arguments[0]).textContent", selector))

    def contrast(self, selector: str) -> float:
        """The contrast of a text and what is behind it, 1 to 21."""
        return float(self.run(CONTRAST, self.one(selector)))

    def pixel(self, canvas: str, x: int, y: int) -> list[int]:
        """Red, green, blue and opacity of a pixel, 0 to 255."""
        script = "return [...document.getElementById(arguments[0]).getContext('2d')"
        values = self.run(f"{script}.getImageData({x}, {y}, 1, 1).data]", canvas)
        return [int(value) for value in values]

    def size(self, width: int, height: int, *, scheme: str = "light") -> None:
        """Have a screen of this size, in the reader's colour scheme."""
        screen = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    def logged(self, kind: str) -> list[dict[str, Any]]:
        """What `browser` (the console) or `performance` has logged since."""
        found: list[dict[str, Any]] = self.driver.get_log(kind)  # type: ignore[no-untyped-call]
        return found

    def requests(self) -> list[str]:
        """The addresses that were asked since."""
        events = [json.loads(entry["message"])["message"] for entry in self.logged("performance")]
        sent = [event for event in events if event["method"] == "Network.requestWillBeSent"]
        return [event["params"]["request"]["url"] for event in sent]


@contextlib.contextmanager
def chromium(folder: Path) -> Iterator[Page]:
    """A new browser with an empty profile; skips where there is none."""
    binary, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if binary is None or driver is None:
        pytest.skip("needs Chromium and its driver (Debian: chromium, chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in (*FLAGS, f"--user-data-dir={folder}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    service = webdriver.ChromeService(executable_path=driver)
    browser = webdriver.Chrome(options, service)
    try:
        yield Page(browser)
    finally:
        browser.quit()


def ask(page: Page, question: str = "Is there effusion?") -> None:
    """Put a question about the image that is shown."""
    page.one("#question").send_keys(question, Keys.ENTER)
