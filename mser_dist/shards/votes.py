"""How many annotators heard which emotion in a clip: the optional field `votes` of its json, {emotion: number}.

The index of a shard repeats it, as a column with null for clips without, where some clip has votes.
"""

import math
import re
from typing import Any

from mser_dist.errors import UserError

Votes = dict[str, float]
_ODD = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\ud800-\udfff]")  # index.CONTROL


def check_votes(value: Any, where: str) -> Votes | None:
    """The votes of a sample's json; None where it has none. Raises `UserError` naming `where` for what are no votes."""
    if value is None:
        return None
    if why := _fault(value):
        raise UserError(f"{where}: 'votes' {why}; it is {{emotion: number of annotators}}, or is left out")
    return {word: number for word, number in value.items() if number}


def _fault(value: Any) -> str:
    if not isinstance(value, dict):
        return f"is {str(value)[:40]!r}, no mapping"
    for word, number in value.items():
        if not isinstance(word, str) or not word or _ODD.search(word):
            return f"names {str(word)[:40]!r}, no emotion"
        if isinstance(number, bool) or not isinstance(number, (int, float)):
            return f"has {str(number)[:40]!r} for {word!r}, no number"
        if not (math.isfinite(number) and number >= 0):
            return f"has {number} for {word!r}, which no number of people is"
    return "" if any(value.values()) else "has no vote"


def are_sound(column: Any, count: int) -> bool:
    """Whether an index's column is one of `count` samples' votes: anyone may have written it."""
    if not isinstance(column, list) or len(column) != count:
        return False
    return not any(one is not None and _fault(one) for one in column)
