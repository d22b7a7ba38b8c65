"""Drives a Chromium that is on the PATH, by the DevTools protocol over a pipe: no package is needed for it."""

import base64
import contextlib
import json
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
    "--mute-audio",
)


def find():
    """The path of a Chromium, or None."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Page:
    """One page of a browser. `problems` gathers what its console complains of."""

    def __init__(self, read, write):
        self._read, self._write, self._rest, self._count, self._session = read, write, b"", 0, None
        self.problems = []
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def send(self, method, **params):
        """One command, and its result; what the browser reports meanwhile is noted."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next(60)
            if answer.get("id") == self._count:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]

    def _next(self, seconds):
        """The next message; events of the page's console and of its requests go to `problems`."""
        deadline = time.monotonic() + seconds
        while b"\0" not in self._rest:
            assert time.monotonic() < deadline, "the browser does not answer"
            chunk = os.read(self._read, 1 << 20)
            assert chunk, "the browser has ended"
            self._rest += chunk
        raw, self._rest = self._rest.split(b"\0", 1)
        message = json.loads(raw)
        params = message.get("params", {})
        if message.get("method") == "Runtime.exceptionThrown":
            self.problems.append(params["exceptionDetails"]["text"])
        if message.get("method") == "Log.entryAdded":
            self.problems.append(params["entry"]["text"])
        if message.get("method") == "Runtime.consoleAPICalled":
            self.problems.append(str(params["args"]))
        if message.get("method") == "Network.requestWillBeSent":
            url = params["request"]["url"]
            if not url.startswith(("file:", "data:", "about:")):
                self.problems.append(f"asks for {url}")
        return message

    def open(self, path, width=1280, height=800, dark=False, scripts=True, media=""):
        """Loads a file in a window of that size, in CSS pixels."""
        self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", media=media, features=[scheme])
        self.send("Emulation.setScriptExecutionDisabled", value=not scripts)
        self.send("Page.navigate", url=Path(path).resolve().as_uri())
        while self._next(60).get("method") != "Page.loadEventFired":
            pass

    def ask(self, expression):
        """The value of a JavaScript expression in the page."""
        result = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def press(self, key, code=0):
        """A key pressed and let go, e.g. "Tab", "ArrowRight"."""
        codes = {
            "Tab": 9,
            "End": 35,
            "Home": 36,
            "ArrowLeft": 37,
            "ArrowUp": 38,
            "ArrowRight": 39,
            "ArrowDown": 40,
            "Escape": 27,
            "Enter": 13,
        }
        for kind in ("rawKeyDown", "keyUp"):
            self.send(
                "Input.dispatchKeyEvent",
                type=kind,
                key=key,
                code=key,
                windowsVirtualKeyCode=code or codes[key],
                nativeVirtualKeyCode=code or codes[key],
            )

    def point(self, x, y):
        """Moves the pointer there."""
        self.send("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def picture(self, path, whole=True):
        """A PNG of the window, or of the whole page."""
        data = self.send("Page.captureScreenshot", format="png", captureBeyondViewport=whole)["data"]
        Path(path).write_bytes(base64.b64decode(data))


@contextlib.contextmanager
def browser():
    """Yields a Page; the browser ends with the block."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        (their_in, ours_out), (ours_in, their_out) = os.pipe(), os.pipe()
        # The protocol's pipes are file descriptors 3 and 4 of the browser.
        command = f'exec "$0" "$@" 3<&{their_in} 4>&{their_out}'
        process = subprocess.Popen(
            ["bash", "-c", command, find(), *FLAGS, f"--user-data-dir={profile}", "about:blank"],
            pass_fds=(their_in, their_out),
            stderr=subprocess.DEVNULL,
        )
        os.close(their_in)
        os.close(their_out)
        try:
            yield Page(ours_in, ours_out)
        finally:
            process.terminate()
            process.wait(20)
            os.close(ours_in)
            os.close(ours_out)
