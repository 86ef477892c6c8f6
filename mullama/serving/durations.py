"""Durations as people write them."""

from __future__ import annotations

import re

from mullama.errors import InvalidRequest

#: JSON Schema of what is taken.
DURATION_SCHEMA = {
    "anyOf": [
        {"type": "null"},
        {"type": "number", "maximum": 1e9},
        {"type": "string", "pattern": r"^(-?[0-9]{1,9}(\.[0-9]{1,9})?|([0-9]{1,4}(\.[0-9]{1,9})?(ms|s|m|h|d)){1,5})$"},
    ]
}


def parse_duration(text: str | float, param: str = "keep_alive") -> float:
    """Seconds of a number or of a text such as ``90``, ``5m``, ``1h30m``, ``-1`` (for ever). Raises InvalidRequest."""
    if isinstance(text, bool):
        raise InvalidRequest(f"{param}: a duration is a number of seconds or a text such as 5m", param=param)
    if isinstance(text, int | float):
        seconds = float(text)
    else:
        units = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
        text = text.strip().lower()
        if re.fullmatch(r"-?\d{1,12}(\.\d{1,9})?", text, re.ASCII):
            seconds = float(text)
        elif re.fullmatch(r"(\d{1,9}(\.\d{1,9})?(ms|s|m|h|d))+", text, re.ASCII):
            parts = re.findall(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)", text)
            seconds = sum(float(number) * units[unit] for number, unit in parts)
        else:
            raise InvalidRequest(f"{param}: '{text[:40]}' is not a duration; write 90, 5m, 1h30m, or -1", param=param)
    if seconds != seconds or seconds > 1e9:
        raise InvalidRequest(f"{param}: {seconds} is not a duration of at most 1e9 seconds", param=param)
    return -1.0 if seconds < 0 else seconds
