"""How each clip of a set is asked about: in the wording of its corpus or language, with what is said in it or not."""

import numpy as np

from mser_dist.models.chat import ChatPrompt
from mser_dist.models.wording import EVERY, transcript_of
from mser_dist.stream.examples import Examples


def ask(clips: Examples, prompt: ChatPrompt) -> list[str]:
    """Give the clips their wordings; a line for the languages that have no words of their own, where others have."""
    if prompt.transcript:
        clips.transcript = transcript_of
    if len(prompt.wordings) == 1:
        return []
    corpora, languages = (clips.shards.coded[name] for name in ("corpus", "language"))
    pairs, places = np.unique(np.stack([corpora.codes, languages.codes]), axis=1, return_inverse=True)
    named = [(str(corpora.names[corpus]), str(languages.names[language])) for corpus, language in pairs.T]
    clips.wording = np.array([prompt.wording(*pair) for pair in named])[places.reshape(-1)]
    own = prompt.words.keys() - {EVERY}
    without = sorted({language for corpus, language in named if own and not own & {corpus, language}})
    if not without:
        return []
    return [f"llm.prompt.words has none for {', '.join(without)}: their clips are asked with the default words"]
