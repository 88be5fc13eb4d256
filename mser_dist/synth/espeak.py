"""eSpeak NG through ctypes: text and prosody parameters in, 16-bit samples out.

The library and its voices come from the PyPI package ``espeakng-loader``; nothing has to be installed on the system.
"""

import ctypes
import os
import threading
from importlib import import_module
from pathlib import Path

import numpy as np

from mser_dist.errors import UserError

# Constants of espeak-ng 1.52, src/include/espeak-ng/speak_lib.h
_OUTPUT_SYNCHRONOUS = 2  # no sound device, no thread: the callback gets the samples before espeak_Synth returns
_DONT_EXIT = 0x8000  # report missing voice data by a return value instead of ending the process
_CHARS_UTF8 = 1
_POS_CHARACTER = 1
_RATE, _VOLUME, _PITCH, _RANGE, _WORD_GAP = 1, 2, 3, 4, 7

_SYNTH_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)


class Espeak:
    """A speech synthesiser whose output depends on its arguments alone.

    eSpeak NG keeps state for the whole process, such as the seed of its noise and the phase of the pitch flutter. Some
    of it no call resets (after ``espeak_Terminate`` and ``espeak_Initialize`` the same text still sounds different), so
    a clip would depend on what was spoken before. The library is therefore loaded afresh for each clip and unloaded
    after it, which costs about 3 ms, and its noise gets a fixed seed.

    Raises:
        UserError: the package ``espeakng-loader`` is missing or not usable.
    """

    _lock = threading.Lock()  # the loaded library is one per process, however many objects there are

    def __init__(self) -> None:
        try:
            loader = import_module("espeakng_loader")
        except ImportError as error:
            raise UserError(
                "speech synthesis needs eSpeak NG, which is not installed: pip install espeakng-loader"
            ) from error
        self._library = Path(loader.get_library_path())
        self._data = Path(loader.get_data_path())
        self._loader = ctypes.CDLL(None)  # the process itself: dlclose
        self._loader.dlclose.argtypes = [ctypes.c_void_p]

    def languages(self) -> set[str]:
        """Those that have a voice, by eSpeak's own codes without a region: mostly ISO 639-1, Mandarin is ``cmn``."""
        return {file.name.partition("-")[0] for file in (self._data / "lang").rglob("*") if file.is_file()}

    def synthesize(
        self,
        text: str,
        voice: str,
        *,
        rate: int = 175,
        pitch: int = 50,
        pitch_range: int = 50,
        volume: int = 100,
        word_gap: int = 0,
    ) -> tuple[np.ndarray, int]:
        """Speak ``text`` and return ``(samples, sample_rate)``: int16 of shape (n,), mono, 22050 Hz.

        Args:
            voice: language and optional variant, such as ``el`` or ``el+f3``.
            rate: words a minute, 80 to 450.
            pitch: 0 to 100; 50 is the voice's own, an octave is about 60.
            pitch_range: 0 (monotone) to 100; 50 is the voice's own.
            volume: per cent, 0 to 200; amplitude grows about in proportion, and overloads above about 50.
            word_gap: pause between words, in units of 10 ms at the normal rate.

        Raises:
            ValueError: unknown voice, a parameter outside its range, or text that gives no sound.
        """
        for name, value, low, high in (
            ("rate", rate, 80, 450),
            ("pitch", pitch, 0, 100),
            ("pitch_range", pitch_range, 0, 100),
            ("volume", volume, 0, 200),
            ("word_gap", word_gap, 0, 50),
        ):
            if not low <= value <= high:
                raise ValueError(f"{name} is {value}: eSpeak takes {low} to {high}")
        variant = voice.partition("+")[2]
        if variant and not (self._data / "voices" / "!v" / variant).is_file():  # eSpeak itself would ignore it
            raise ValueError(f"eSpeak has no voice variant {variant!r} (asked for as {voice!r})")
        parameters = {_RATE: rate, _VOLUME: volume, _PITCH: pitch, _RANGE: pitch_range, _WORD_GAP: word_gap}
        with self._lock:
            library = self._load()
            try:
                samples, sample_rate = self._speak(library, text, voice, parameters)
            finally:
                library.espeak_Terminate()
                self._loader.dlclose(library._handle)
        if not samples.any():
            raise ValueError(f"eSpeak made no sound from {text!r} with voice {voice!r}")
        return samples, sample_rate

    def _load(self) -> ctypes.CDLL:
        """Load a fresh library; refuse one that is still in memory, as its state would leak into the clip."""
        try:
            held = ctypes.CDLL(str(self._library), mode=os.RTLD_NOLOAD | os.RTLD_NOW)
        except OSError:
            return ctypes.CDLL(str(self._library))
        self._loader.dlclose(held._handle)
        raise UserError(
            "eSpeak NG is held by another part of this process, so clips would not be reproducible: "
            "synthesise in a process of its own"
        )

    def _speak(self, library: ctypes.CDLL, text: str, voice: str, parameters: dict[int, int]) -> tuple[np.ndarray, int]:
        chunks: list[bytes] = []

        @_SYNTH_CALLBACK
        def collect(wave: "ctypes._Pointer[ctypes.c_short]", count: int, _events: int | None) -> int:
            if wave and count > 0:
                chunks.append(ctypes.string_at(wave, 2 * count))
            return 0  # go on

        sample_rate = library.espeak_Initialize(_OUTPUT_SYNCHRONOUS, 0, str(self._data).encode(), _DONT_EXIT)
        if sample_rate <= 0:
            raise UserError(
                f"eSpeak NG cannot read its voices in {self._data}: pip install --force-reinstall espeakng-loader"
            )
        library.espeak_ng_SetRandSeed(ctypes.c_long(1))  # else seeded by the clock
        library.espeak_SetSynthCallback(collect)
        if library.espeak_SetVoiceByName(voice.encode()) != 0:
            raise ValueError(f"eSpeak has no voice {voice!r}")
        for parameter, value in parameters.items():
            if library.espeak_SetParameter(parameter, value, 0) != 0:
                raise ValueError(f"eSpeak refused parameter {parameter} = {value}")
        data = text.encode() + b"\0"
        start = end = ctypes.c_uint(0)  # the whole text
        size = ctypes.c_size_t(len(data))
        status = library.espeak_Synth(data, size, start, _POS_CHARACTER, end, _CHARS_UTF8, None, None)
        if status != 0:
            raise RuntimeError(f"espeak_Synth failed with status {status} for {text!r}")
        return np.frombuffer(b"".join(chunks), dtype=np.int16), sample_rate
