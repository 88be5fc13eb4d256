"""Speech by a program of the user's, over a line protocol: whatever speaks best today needs no code here.

The protocol, with an example, is in README.md.
"""

import json
import os
import selectors
import shlex
import signal
import subprocess
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from mser_dist import audio
from mser_dist.errors import UserError
from mser_dist.translation.measures import CLIPPED, decoded
from mser_dist.translation.parts import NotMadeError, Source

_START = 600.0  # seconds until it says that it is there: models load
_LONGEST = 120.0  # seconds of a clip
_IN_A_ROW = 5  # recordings at which it dies or hangs, one after the other, until that is taken for its fault
_TAIL = 2000  # bytes of what it wrote to standard error that are looked at


class Command:
    """A program that is asked for one clip after the other, and started anew when it dies or does not answer.

    Args:
        line: the command line.
        timeout: seconds for an answer.
        tries: times that it is asked for a clip.
        seed: handed on with every request.

    Raises `UserError` for a program that is not there, or says nothing of itself.
    """

    def __init__(self, line: str, timeout: float, tries: int, seed: int) -> None:
        self._line, self._timeout, self._tries, self._seed = line, timeout, tries, seed
        self._folder = tempfile.TemporaryDirectory(prefix="mser-speech-")
        self._errors: IO[bytes] = (Path(self._folder.name) / "stderr").open("wb+")
        self._failed: list[str] = []  # recordings in a row
        self._process: subprocess.Popen[bytes] | None = None
        self._rest = b""
        try:
            hello = self._start()
        except UserError:
            self.close()
            raise
        languages = hello.get("languages")
        self._languages = None if languages is None else {str(name) for name in languages}
        self.about: dict[str, Any] = {
            "name": "command",
            "command": line,
            "program": str(hello["name"]),
            "version": str(hello.get("version", "")),
        }

    def languages(self) -> set[str] | None:
        return self._languages

    def speak(self, source: Source, text: str, language: str) -> NDArray[np.float32]:
        """Raises `NotMadeError` where it gives nothing, `UserError` where it does so time after time."""
        folder = Path(self._folder.name)
        heard, out = folder / "source.wav", folder / "out.wav"
        heard.write_bytes(audio.encode(audio.to_pcm16(source.audio), audio.SAMPLE_RATE, "wav"))
        asked = {
            "id": source.id,
            "source": str(heard),
            "source_text": source.text,
            "source_language": source.language,
            "text": text,
            "language": language,
            "emotion": source.emotion,
            "speaker": source.speaker,
            "gender": source.gender,
            "seed": self._seed,
            "out": str(out),
        }
        why = ""
        for _ in range(self._tries):
            out.unlink(missing_ok=True)
            try:
                answer = self._ask(asked)
            except _LostError as lost:
                why = str(lost)
                self._end()
                continue
            self._failed = []
            return self._wave(answer, out)
        if source.id not in self._failed:  # one recording may be asked for in many languages
            self._failed.append(source.id)
        if len(self._failed) == _IN_A_ROW:
            raise UserError(
                f"speech.command {self._line!r}: {why} at {_IN_A_ROW} recordings in a row{self._said()}: mend it, and "
                "the same command goes on"
            )
        raise NotMadeError(why)

    def close(self) -> None:
        """End the program, and remove its files."""
        self._end()
        self._errors.close()
        self._folder.cleanup()

    def _end(self) -> None:
        """End the program, and what it has started."""
        if self._process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                with suppress(OSError):
                    if pipe:
                        pipe.close()
        self._process, self._rest = None, b""

    def _wave(self, answer: dict[str, Any], out: Path) -> NDArray[np.float32]:
        if "error" in answer:
            raise NotMadeError(f"the program: {' '.join(str(answer['error']).split())[:60]}")
        try:
            data = out.read_bytes()
        except OSError:
            data = b""
        if not data:
            raise NotMadeError("the program made nothing")
        try:
            wave, clipped = decoded(data, str(out))
        except UserError:
            raise NotMadeError("the program made no readable audio") from None
        if len(wave) > _LONGEST * audio.SAMPLE_RATE:
            raise NotMadeError(f"the program made more than {_LONGEST:.0f} s")
        if clipped > CLIPPED:
            raise NotMadeError("the program's audio is clipped")
        return wave

    def _start(self) -> dict[str, Any]:
        """What it says of itself."""
        try:
            self._process = subprocess.Popen(
                shlex.split(self._line),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                bufsize=0,
                start_new_session=True,
            )
        except (OSError, ValueError, IndexError) as error:
            raise UserError(f"speech.command {self._line!r} cannot be started ({error}): see its path") from None
        try:
            hello = self._answer(_START)
        except _LostError as lost:
            self._end()
            raise UserError(
                f"speech.command {self._line!r}: {lost} when it was started{self._said()}: mend it"
            ) from None
        if "name" not in hello or not isinstance(hello.get("languages"), (list, type(None))):
            self._end()
            raise UserError(
                f'speech.command {self._line!r} began with {json.dumps(hello)[:80]}: let it begin with {{"name": …, '
                '"version": …, "languages": [codes] or null}'
            )
        return hello

    def _ask(self, asked: dict[str, Any]) -> dict[str, Any]:
        if self._process is None:
            self._start()
        assert self._process is not None and self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(asked, ensure_ascii=False).encode() + b"\n")
        except OSError:
            raise _LostError("the program died") from None
        until = time.monotonic() + self._timeout
        while True:  # an answer to an earlier request is none to this one
            answer = self._answer(until - time.monotonic())
            if answer.get("id") == asked["id"]:
                return answer

    def _answer(self, seconds: float) -> dict[str, Any]:
        """The next line that is a JSON object; what else a program prints is passed over."""
        assert self._process is not None and self._process.stdout is not None
        until = time.monotonic() + seconds
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while True:
                if time.monotonic() >= until:  # it may write, and never what was asked for
                    raise _LostError("the program did not answer")
                line, newline, rest = self._rest.partition(b"\n")
                if newline:
                    self._rest = rest
                    with suppress(ValueError):
                        found = json.loads(line)
                        if isinstance(found, dict):
                            return found
                    continue
                if not selector.select(max(0.0, until - time.monotonic())):
                    raise _LostError("the program did not answer")
                chunk = os.read(self._process.stdout.fileno(), 1 << 16)
                if not chunk:
                    raise _LostError("the program died")
                self._rest += chunk

    def _said(self) -> str:
        """The last line that it wrote to standard error, for a message."""
        self._errors.flush()
        size = self._errors.seek(0, os.SEEK_END)
        self._errors.seek(max(0, size - _TAIL))
        lines = self._errors.read().decode("utf-8", "replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "")
        return f" ({last[:160]})" if last else ""


class _LostError(Exception):
    """It gives no answer any more."""
