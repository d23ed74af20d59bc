"""Pages in headless Chromium, as Debian has it, with the network off: what is on them, and what they complain of."""

import contextlib
import json
import shutil
import time

import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
OPTIONS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-dev-shm-usage",
    "--enable-unsafe-swiftshader",
    "--window-size=1400,1000",
    # Whatever host is asked for, there is none.
    "--host-resolver-rules=MAP * ~NOTFOUND",
)


def _missing():
    if not any(map(shutil.which, BROWSERS)) or not shutil.which("chromedriver"):
        return "there is no Chromium with its driver; scripts/install_chromium.sh installs them"
    try:
        import selenium  # noqa: F401
    except ImportError:
        return "selenium is not installed"
    return None


needs_browser = pytest.mark.skipif(_missing() is not None, reason=str(_missing()))


class Page:
    """A page that is open, once its scripts have run."""

    def __init__(self, driver, path):
        self.driver = driver
        driver.get_log("browser"), driver.get_log("performance")
        driver.get(path.resolve().as_uri())
        self.wait("document.documentElement.dataset.ready === 'yes'")

    def run(self, script, *arguments):
        """What a script returns."""
        return self.driver.execute_script(script, *arguments)

    def wait(self, condition, seconds=30):
        """Wait until an expression is true."""
        end = time.monotonic() + seconds
        while not self.run(f"return Boolean({condition})"):
            assert time.monotonic() < end, (condition, self.complaints())
            time.sleep(0.05)

    def text(self, selector):
        """The text that an element shows."""
        return self.run("return document.querySelector(arguments[0]).innerText", selector)

    def complaints(self):
        """Errors on the console."""
        return [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] == "SEVERE"]

    def requests(self):
        """Addresses that were asked for, besides the page itself and what it holds."""
        events = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        asked = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
        return [address for address in asked if not address.startswith(("file:", "data:", "blob:"))]


@contextlib.contextmanager
def browser():
    """A function that opens a page from its path; one window for all."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    for option in OPTIONS:
        options.add_argument(option)
    options.binary_location = next(path for name in BROWSERS if (path := shutil.which(name)))
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    try:
        yield lambda path: Page(driver, path)
    finally:
        driver.quit()
