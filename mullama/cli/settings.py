"""The sampling settings of ``mullama run``: its flags, and what /set takes. Imports nothing heavy.

The ranges are those of the HTTP API (``mullama.web.openai.sampling.RANGES``).
"""

from __future__ import annotations

from mullama.errors import InvalidRequest

#: Name -> (type, help).
SETTINGS: dict[str, tuple[type[int] | type[float], str]] = {
    "temperature": (float, "randomness; 0 is greedy"),
    "top_k": (int, "choose among the K likeliest tokens; 0: all"),
    "top_p": (float, "choose among the likeliest tokens that hold this probability together"),
    "min_p": (float, "drop tokens below this share of the likeliest one's probability"),
    "repeat_penalty": (float, "penalty of tokens that appeared lately; 1: none"),
    "seed": (int, "seed of the random numbers; the same seed gives the same text"),
    "max_tokens": (int, "most tokens of a reply"),
}


def parse_setting(name: str, value: str | float) -> tuple[str, int | float]:
    """A setting by its name (``top-k`` or ``top_k``) and its text or number. Raises InvalidRequest."""
    from mullama.web.openai.sampling import check_range

    key = name.replace("-", "_").lower()
    if key not in SETTINGS:
        raise InvalidRequest(f"there is no setting '{name}'; there are {', '.join(SETTINGS)}", param=name)
    kind = SETTINGS[key][0]
    try:
        number = kind(value)
    except (ValueError, OverflowError):
        expected = "a whole number" if kind is int else "a number"
        raise InvalidRequest(f"{key}: '{value}' is not {expected}", param=key) from None
    check_range(key, number)
    return key, number
