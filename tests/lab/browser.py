"""A real browser, headless Chromium, driven by its DevTools protocol: goes to a page, waits, asks, takes pictures."""

import asyncio
import base64
import os
import re
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import aiohttp

PROGRAMS = ("chromium", "chromium-browser", "google-chrome")


def program() -> str | None:
    """The browser that is installed, or None."""
    return next((found for name in PROGRAMS if (found := shutil.which(name))), None)


class Browser:
    """One page of it. A call that waits raises TimeoutError with what the page shows."""

    def __init__(self, folder: Path, width: int = 1600, height: int = 1000) -> None:
        name = program()
        assert name is not None
        words = ["--headless=new", "--remote-debugging-port=0", f"--user-data-dir={folder / 'profile'}"]
        words += ["--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", f"--window-size={width},{height}"]
        words += ["--no-sandbox"] if os.geteuid() == 0 else []
        self._said = (folder / "browser.log").open("w+", encoding="utf-8", errors="replace")
        self._process = subprocess.Popen([name, *words, "about:blank"], stdout=self._said, stderr=self._said)
        self._loop = asyncio.new_event_loop()
        self._number = 0
        try:
            self._loop.run_until_complete(self._connect(folder / "browser.log"))
        except BaseException:
            self.close()
            raise

    async def _connect(self, log: Path) -> None:
        deadline = time.monotonic() + 60
        while not (
            found := re.search(r"listening on ws://([^/]+)/", log.read_text(encoding="utf-8", errors="replace"))
        ):
            assert self._process.poll() is None and time.monotonic() < deadline, log.read_text(errors="replace")
            await asyncio.sleep(0.1)
        self._session = aiohttp.ClientSession()
        async with self._session.get(f"http://{found[1]}/json/list") as answer:
            targets = await answer.json()
        address = next(one["webSocketDebuggerUrl"] for one in targets if one["type"] == "page")
        self._socket = await self._session.ws_connect(address, max_msg_size=0)

    def _call(self, method: str, **params: Any) -> dict[str, Any]:
        return self._loop.run_until_complete(asyncio.wait_for(self._ask(method, params), 120))

    async def _ask(self, method: str, params: dict[str, Any]) -> dict[str, Any]:
        self._number += 1
        await self._socket.send_json({"id": self._number, "method": method, "params": params})
        while True:
            answer = await self._socket.receive_json()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return dict(answer["result"])

    def goto(self, url: str) -> None:
        """Open a page; one of the same document too."""
        self._call("Page.navigate", url="about:blank")
        self._call("Page.navigate", url=url)

    def ask(self, script: str) -> Any:
        """The value of a JavaScript expression; a promise is waited for."""
        found = self._call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def wait(self, script: str, seconds: float = 120.0) -> Any:
        """The value of an expression as soon as it is true."""
        deadline = time.monotonic() + seconds
        while True:
            value = self.ask(f"(() => {{ try {{ return {script} }} catch (e) {{ return null }} }})()")
            if value:
                return value
            if time.monotonic() > deadline:
                raise TimeoutError(f"{script}: the page shows {self.text()[:2000]!r}")
            time.sleep(0.25)

    def text(self) -> str:
        """What a person reads on the page."""
        return str(self.ask("document.body ? document.body.innerText : ''"))

    def click(self, script: str) -> None:
        """Click on the element that an expression gives, once it is there, as a person does."""
        self.wait(f"!!({script})")
        x, y = self.ask(
            f"(() => {{ const e = {script}; e.scrollIntoView({{block: 'center'}}); const r = e.getBoundingClientRect();"
            " return [r.x + r.width / 2, r.y + r.height / 2] })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self._call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def picture(self, path: Path) -> Path:
        """Write what is seen now."""
        found = self._call("Page.captureScreenshot", format="png")
        path.write_bytes(base64.b64decode(found["data"]))
        return path

    def close(self) -> None:
        """End it."""
        if hasattr(self, "_socket"):
            self._loop.run_until_complete(self._socket.close())
        if hasattr(self, "_session"):
            self._loop.run_until_complete(self._session.close())
        self._loop.close()
        self._process.terminate()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._said.close()
