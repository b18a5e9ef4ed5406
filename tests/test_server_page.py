"""The page at `/`: what it may do, and that it works in a real browser, where one is installed."""

from __future__ import annotations

import base64
import fcntl
import itertools
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from serving import Running, running, slowed, until

from pyllm import LLM

ROOT = Path(__file__).parents[1]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
BEGINNING = "Once upon a time, there lived a little girl named Mia."


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(LLM(ROOT / "pyllm" / "data" / "stories", threads=2, seed=3)) as made:
        yield made


def test_the_page_loads_nothing_and_may_do_little(server: Running) -> None:
    answer = server.client.get("/")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert len(answer.content) < 30_000
    policy = dict(part.split(" ", 1) for part in answer.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == "'none'"
    assert policy["connect-src"] == "'self'"
    assert policy["script-src"].startswith("'sha256-") and policy["style-src"].startswith("'sha256-")
    assert not re.search(r"https?:|//\w|src=|href=|innerHTML|insertAdjacent|document\.write|\son\w+=", answer.text)


def test_a_browser_gets_in_with_the_key_as_password() -> None:
    with running(LLM(ROOT / "pyllm" / "data" / "stories", threads=1), keys=("right",)) as server:
        refused = server.client.get("/", headers={"Authorization": ""})
        assert refused.status_code == 401 and refused.headers["www-authenticate"].startswith("Basic ")
        for path in ("/", "/v1/models"):
            headers = {"Authorization": "Basic " + base64.b64encode(b"anyone:right").decode()}
            assert server.client.get(path, headers=headers).status_code == 200


class Page:
    """A page in a headless browser, driven through a pipe by its DevTools protocol."""

    def __init__(self, commands: int, answers: int) -> None:
        self._commands, self._answers = os.fdopen(commands, "wb"), os.fdopen(answers, "rb")
        self._numbers = itertools.count(1)
        self._session: str | None = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": params}
        message |= {"sessionId": self._session} if self._session else {}
        self._commands.write(json.dumps(message).encode() + b"\0")
        self._commands.flush()
        while True:
            text = bytearray()
            while (byte := self._answers.read(1)) != b"\0":
                assert byte, "the browser is gone"
                text += byte
            answer = json.loads(text)
            if answer.get("id") == number:
                assert "error" not in answer, answer
                result: dict[str, Any] = answer["result"]
                return result

    def run(self, script: str) -> Any:
        result = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def press(self, key: str) -> None:
        for kind in ("rawKeyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key)

    def send(self, text: str) -> None:
        self.run("document.getElementById('prompt').focus()")
        self.call("Input.insertText", text=text)
        self.press("Enter")

    @property
    def state(self) -> str:
        return str(self.run("document.getElementById('state').textContent"))

    @property
    def said(self) -> list[str]:
        return list(self.run("[...document.querySelectorAll('.said')].map((one) => one.textContent)"))


@contextmanager
def opened(url: str, folder: Path, scheme: str = "light") -> Iterator[Page]:
    if CHROMIUM is None:
        pytest.skip("no chromium is installed")
    (their_in, commands), (answers, their_out) = os.pipe(), os.pipe()
    ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (their_in, their_out)]

    def give_ends() -> None:  # where the browser looks for them
        os.dup2(ends[0], 3)
        os.dup2(ends[1], 4)

    options = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", f"--user-data-dir={folder}"]
    process = subprocess.Popen([CHROMIUM, *options], preexec_fn=give_ends, pass_fds=(3, 4), stderr=subprocess.DEVNULL)
    for end in (their_in, their_out, *ends):
        os.close(end)
    try:
        page = Page(commands, answers)
        page.call("Emulation.setDeviceMetricsOverride", width=760, height=620, deviceScaleFactor=1, mobile=False)
        page.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        page.call("Page.navigate", url=url)
        until(lambda: page.run("document.querySelector('h1')?.textContent") == "tiny")
        yield page
    finally:
        process.kill()
        process.wait()


def test_a_conversation(server: Running, tmp_path: Path) -> None:
    with opened(server.url, tmp_path) as page:
        page.run("document.getElementById('temperature').value = 0")
        with slowed(server.llm, 0.01):
            page.send(BEGINNING)
            until(lambda: len(page.said) == 2 and len(page.said[1]) > 20)
            early = page.said[1]
            until(lambda: "tokens/s" in page.state, 30)
        [expected] = server.llm.chat([{"role": "user", "content": BEGINNING}], temperature=0, max_tokens=512)
        text = expected.outputs[0].text
        assert page.said == [BEGINNING, text]
        assert text.startswith(early) and len(early) < len(text)  # it was streamed
        if "PYLLM_PICTURE" in os.environ:
            picture = page.call("Page.captureScreenshot", format="png")["data"]
            Path(os.environ["PYLLM_PICTURE"]).write_bytes(base64.b64decode(picture))
        with slowed(server.llm, 0.05):
            page.send("Then <img src=x onerror=alert(1)> <b>came</b>")
            until(lambda: len(page.said) == 4 and bool(page.said[3]))
            page.press("Escape")
            until(lambda: page.state == "stopped")
        server.assert_idle()
        assert page.said[2] == "Then <img src=x onerror=alert(1)> <b>came</b>"
        assert page.run("document.querySelectorAll('img, b').length") == 0
        page.run("document.getElementById('top_p').value = 2")
        page.send("too much")
        until(lambda: page.run("document.querySelectorAll('.error').length") == 1)
        assert "top_p" in page.said[-1] and "too much" not in page.said
        assert page.run("document.getElementById('prompt').value") == "too much"  # to be sent again
        assert page.run("messages.at(-1).role") == "assistant"
        page.run("document.getElementById('top_p').value = document.getElementById('prompt').value = ''")
        with slowed(server.llm, 0.05):
            page.send("Who was she?")
            until(lambda: len(page.said) == 7 and bool(page.said[6]))
            page.run("document.getElementById('fresh').click()")
            until(lambda: page.run("running === null"))
        assert page.said == [] and page.run("messages.length") == 0  # nothing of the old answer is in the new one


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_can_be_read(server: Running, tmp_path: Path, scheme: str) -> None:
    """Contrast of text and its background of at least 4.5, as WCAG 2 asks."""

    def luminance(colour: str) -> float:
        parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    with opened(server.url, tmp_path, scheme) as page:
        colours = page.run(
            "['body', '#send', 'button#fresh', '#prompt'].map((one) => { const s = getComputedStyle("
            "document.querySelector(one)); return [s.color, s.backgroundColor]; })"
        )
    for front, back in colours:
        light, dark = sorted((luminance(front), luminance(back)), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5, (front, back)
