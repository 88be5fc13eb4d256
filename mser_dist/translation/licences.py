"""What the publishers of corpora allow, as far as it is known here: a user has to look it up.

By the corpus' name in the shards. "restricted": by an agreement with the publisher; None: not known.
"""

LICENCES: dict[str, str | None] = {
    "aesdd": "CC BY 4.0",
    "cafe": "CC BY-NC-SA 4.0",
    "cremad": "ODbL 1.0",
    "emodb": "free for research",
    "emodb_uncut": "free for research",
    "emovo": "free for research",
    "esd": "free for research",
    "iemocap": "restricted",
    "jl": "CC0",
    "m5ser-espeak": "no recording: made by mser synth",
    "meld": "GPL-3.0",
    "mesd": "CC BY 4.0",
    "msp-podcast": "restricted",
    "nemo": "CC BY-NC-SA 4.0",
    "ravdess": "CC BY-NC-SA 4.0",
    "resd": "MIT",
    "savee": "free for research",
    "shemo": "Apache-2.0",
    "subesco": "CC BY 4.0",
    "tess": "CC BY-NC-ND 4.0",
    "urdu": "free for research",
}


def allows(licence: str | None) -> str:
    """What may be done with what is derived from a corpus of this licence, in a sentence."""
    if licence is None:
        return "Unknown: ask the publisher before you pass anything on."
    if "ND" in licence:
        return "What is derived from it may not be passed on; no commercial use."
    if licence == "restricted":
        return "By the agreement with the publisher; most forbid to pass on what is derived from it."
    if licence == "free for research":
        return "Research; ask the publisher before you pass anything on."
    parts = []
    if "NC" in licence:
        parts.append("no commercial use")
    if "SA" in licence or licence.startswith("ODbL") or licence.startswith("GPL"):
        parts.append("to be passed on under the same licence alone")
    if "BY" in licence or licence in ("MIT", "Apache-2.0"):
        parts.append("name its authors")
    return f"{'; '.join(parts).capitalize()}." if parts else "No conditions are known."
