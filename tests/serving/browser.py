"""A page in a real browser. Where there is none, what imports this is skipped."""

import shutil

import pytest
from selenium import webdriver

from tests.helpers.waiting import wait_until

Keys = webdriver.Keys
BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
if not (BROWSER and DRIVER):
    pytest.skip("no chromium with chromedriver: apt-get install chromium chromium-driver", allow_module_level=True)

OPTIONS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage")


class Page:
    """What a reader sees and does."""

    def __init__(self, driver):
        self.driver = driver

    def open(self, url: str) -> "Page":
        self.driver.get(url)
        return self

    def run(self, script: str, *arguments):
        return self.driver.execute_script(f"return {script}", *arguments)

    def all(self, selector: str) -> list:
        return self.driver.find_elements("css selector", selector)

    def texts(self, selector: str) -> list[str]:
        return self.run("[...document.querySelectorAll(arguments[0])].map((e) => e.textContent)", selector)

    def answer(self, of: int = -1) -> list[tuple[str, str, str]]:
        """(state, text, title) of each token of an answer."""
        script = """[...[...document.querySelectorAll(".turn .answer")].at(arguments[0]).children].map(
            (e) => [e.classList[1], e.textContent, e.title])"""
        return [tuple(token) for token in self.run(script, of)]

    def color(self, selector: str, of: str = "backgroundColor") -> str:
        return self.run("getComputedStyle(document.querySelector(arguments[0]))[arguments[1]]", selector, of)

    def focused(self) -> str:
        """Its id, its name or its text."""
        return self.run("((e) => e.id || e.name || e.textContent.trim())(document.activeElement)")

    def press(self, *keys: str) -> None:
        webdriver.ActionChains(self.driver, duration=0).send_keys(*keys).perform()

    def ask(self, text: str) -> None:
        self.press(text, Keys.ENTER)

    def finishes(self) -> None:
        wait_until(lambda: not self.all("#send[hidden]"))

    def sees(self, text: str) -> None:
        wait_until(lambda: text in self.run("document.body.innerText"))

    def emulate(self, width: int = 1000, height: int = 800, **features: str) -> None:
        """Media features, such as prefers_color_scheme, and the size of the window."""
        media = [{"name": name.replace("_", "-"), "value": value} for name, value in features.items()]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": media})
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


@pytest.fixture(scope="module")
def browser():
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for option in OPTIONS:
        options.add_argument(option)
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield Page(driver)
    driver.quit()
