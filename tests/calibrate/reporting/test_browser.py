"""The page in a real browser, where one is installed: the slider moves, the button copies, nothing overflows."""

import base64
import functools
import http.server
import json
import shutil
import subprocess
import threading
import urllib.request

import pytest
from tornado.ioloop import IOLoop
from tornado.websocket import websocket_connect

from calibrate.reporting.report import report
from calibrate.reporting.run_data import example_run

NAMES = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--remote-debugging-port=0",
    "--no-first-run",
    "--hide-scrollbars",
)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine"),
]


class Page:
    """A page of a running Chromium, driven through its DevTools protocol."""

    def __init__(self, browser_url, address):
        with urllib.request.urlopen(f"{browser_url}/json/list") as answer:
            (target,) = (row for row in json.load(answer) if row["type"] == "page")
        self._loop, self._number = IOLoop(make_current=False), 0
        url = target["webSocketDebuggerUrl"]
        self._socket = self._loop.run_sync(
            functools.partial(websocket_connect, url, max_message_size=2**28)
        )
        permissions = ["clipboardReadWrite", "clipboardSanitizedWrite"]
        self.send("Browser.grantPermissions", permissions=permissions)
        self.send("Page.enable")
        self.send("Page.navigate", url=address)
        self.wait_for("document.readyState == 'complete' && location.href != 'about:blank'")

    def send(self, method, **params):
        self._number += 1
        message = json.dumps({"id": self._number, "method": method, "params": params})
        self._loop.run_sync(lambda: self._socket.write_message(message))
        while True:
            answer = json.loads(self._loop.run_sync(self._socket.read_message))
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]

    def value(self, expression):
        options = {"awaitPromise": True, "returnByValue": True}
        result = self.send("Runtime.evaluate", expression=expression, **options)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def wait_for(self, condition):
        for _ in range(100):
            if self.value(condition):
                return
            self.value("new Promise(done => setTimeout(done, 50))")
        raise AssertionError(f"never true: {condition}")

    def mouse(self, kind, x, y):
        self.send(
            "Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1
        )

    def box(self, element):
        """Left, top, width and height of an element, after scrolling to it."""
        return self.value(
            f"(() => {{ const e = {element}; e.scrollIntoView({{block: 'center'}}); "
            "const r = e.getBoundingClientRect(); return [r.left, r.top, r.width, r.height]; })()"
        )

    def show(self, width, dark=False):
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.send("Emulation.setEmulatedMedia", features=scheme)
        self.send(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=900, deviceScaleFactor=1, mobile=False,
        )  # fmt: skip

    def picture(self):
        whole = self.send("Page.captureScreenshot", captureBeyondViewport=True)
        return base64.b64decode(whole["data"])


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("browser")
    shutil.copytree(example_run(), folder / "run")
    served = report(folder / "run").parent
    handler = functools.partial(Quiet, directory=served)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    profile = folder / "profile"
    browser = subprocess.Popen(
        [BROWSER, *FLAGS, f"--user-data-dir={profile}", "about:blank"],
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        listening = next(line for line in browser.stderr if "DevTools listening" in line)
        port = listening.split(":")[-1].split("/")[0]
        yield Page(
            f"http://127.0.0.1:{port}", f"http://127.0.0.1:{server.server_port}/report.html"
        )
    finally:
        browser.terminate()
        browser.wait()
        server.shutdown()


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass


def test_dragging_the_slider_uncovers_the_cached_image(page):
    page.show(1400)
    first = "document.querySelector('.pair')"
    clip = f"getComputedStyle({first}.querySelectorAll('img')[1]).clipPath"
    assert page.value(clip) == "inset(0px 0px 0px 50%)"
    left, top, width, height = page.box(f"{first}.querySelector('input')")
    middle = top + height / 2
    page.mouse("mousePressed", left + width / 2, middle)
    page.mouse("mouseMoved", left + width - 2, middle)
    page.mouse("mouseReleased", left + width - 2, middle)
    assert page.value(f"{first}.querySelector('input').value") == "100"
    assert page.value(clip) == "inset(0px 0px 0px 100%)"
    second = "document.querySelectorAll('.pair')[1].querySelector('input').value"
    assert page.value(second) == "50"


def test_the_button_copies_what_stands_beside_it(page):
    page.show(1400)
    button = "document.querySelector('button.copy')"
    left, top, width, height = page.box(button)
    for kind in ("mousePressed", "mouseReleased"):
        page.mouse(kind, left + width / 2, top + height / 2)
    page.wait_for(f"{button}.textContent != 'Copy'")
    assert page.value(f"{button}.textContent") == "Copied"
    copied = page.value("navigator.clipboard.readText()")
    assert (
        copied
        == page.value(f"{button}.parentElement.querySelector('code').textContent")
        != ""
    )


def test_without_a_clipboard_the_text_is_selected(page):
    button = "[...document.querySelectorAll('button.copy')].at(-1)"
    page.value(
        "Object.defineProperty(navigator, 'clipboard', {value: undefined, configurable: true})"
    )
    page.value(f"{button}.click()")
    page.wait_for(f"{button}.textContent == 'Selected'")
    text = page.value(f"{button}.parentElement.querySelector('code').textContent")
    assert page.value("getSelection().toString().trim()") == text.strip()
    page.value("delete navigator.clipboard")


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1400, 400])
def test_nothing_overflows_and_the_colours_follow_the_reader(page, width, dark):
    page.show(width, dark)
    assert page.value("document.documentElement.scrollWidth") <= width
    background, ink = (
        page.value(f"getComputedStyle(document.body).{name}.match(/\\d+/g).map(Number)")
        for name in ("backgroundColor", "color")
    )
    assert (sum(background) < sum(ink)) is dark
    assert abs(sum(background) - sum(ink)) > 3 * 150
