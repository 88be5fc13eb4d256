"""What models call a language: ISO 639-3 codes, with a script behind them, or in underscores."""

from collections.abc import Container

# ISO 639-1: ISO 639-3, the individual language before the macrolanguage.
_THREE = {
    "am": ("amh",), "ar": ("arb", "ara"), "bg": ("bul",), "bn": ("ben",), "ca": ("cat",), "cs": ("ces",),
    "cy": ("cym",), "da": ("dan",), "de": ("deu",), "el": ("ell",), "en": ("eng",), "es": ("spa",),
    "et": ("est", "ekk"), "eu": ("eus",), "fa": ("pes", "fas"), "fi": ("fin",), "fr": ("fra",), "gl": ("glg",),
    "gu": ("guj",), "he": ("heb",), "hi": ("hin",), "hr": ("hrv",), "hu": ("hun",), "hy": ("hye",),
    "id": ("ind",), "is": ("isl",), "it": ("ita",), "ja": ("jpn",), "ka": ("kat",), "kk": ("kaz",),
    "kn": ("kan",), "ko": ("kor",), "lt": ("lit",), "lv": ("lvs", "lav"), "mk": ("mkd",), "ml": ("mal",),
    "mr": ("mar",), "ms": ("zsm", "zlm"), "ne": ("npi",), "nl": ("nld",), "no": ("nob", "nor"), "pa": ("pan",),
    "pl": ("pol",), "pt": ("por",), "ro": ("ron",), "ru": ("rus",), "sk": ("slk",), "sl": ("slv",),
    "sq": ("als", "sqi"), "sr": ("srp",), "sv": ("swe",), "sw": ("swh", "swa"), "ta": ("tam",), "te": ("tel",),
    "th": ("tha",), "tl": ("tgl",), "tr": ("tur",), "uk": ("ukr",), "ur": ("urd",), "vi": ("vie",),
    "zh": ("cmn", "zho"),
}  # fmt: skip
_SCRIPTS = ("Latn", "Hans", "Cyrl", "Arab", "Grek", "Deva", "Beng", "Ethi", "Hebr", "Jpan", "Hang", "Thai", "Taml",
            "Telu", "Knda", "Mlym", "Gujr", "Guru", "Geor", "Armn")  # fmt: skip


def codes(language: str) -> tuple[str, ...]:
    """Names of a language, an ISO 639-1 or 639-3 code: its own, and those of three letters."""
    own = language.partition("-")[0].lower()
    return (own, *_THREE.get(own, ()))


def three(language: str) -> str:
    """Its first code of three letters."""
    return next((code for code in codes(language) if len(code) == 3), language)


def among(language: str, names: Container[str]) -> str | None:
    """The name that a model's vocabulary has for a language: fr, fra, fra_Latn, __fr__, __fra__."""
    for code in codes(language):
        written = (f"{code}_{script}" for script in _SCRIPTS)
        for name in (*written, code, f"__{code}__"):
            if name in names:
                return name
    return None


def known() -> list[str]:
    """The languages that have an ISO 639-1 code here."""
    return sorted(_THREE)
