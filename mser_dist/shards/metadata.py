"""What stands in a sample's metadata: a value of any type as text, and the splits by name.

Light, so that the command line may name them.
"""

import json
from typing import Any

SPLITS = ("train", "val", "test")


def as_text(value: Any) -> str | None:
    """A value of any JSON type as text: a text is itself, 3 is "3", a list is compact JSON; None where there is none.

    NaN is none: so Python writes what is missing in a column of numbers.
    """
    if isinstance(value, str):
        return value
    if value is None or value != value:
        return None
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
