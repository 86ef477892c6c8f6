"""From what trials found to the way that each type of weights is computed in. Pure: no clock, process or compiled
code.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mullama.machine.trials import ATTENTION, CLASSES, LAYOUTS, TIMED, WAYS, Found

#: How much the speed at a number of columns counts where one layout must do for all: decoding alone, decoding in
#: company, prompts.
WEIGHTS = {1: 3.0, 2: 1.0, 4: 1.5, 8: 2.0, 16: 1.5, 32: 1.0, 128: 4.0}

#: A layout of its own must be faster by this, since it is a copy of the weights; a way whose results depend on what is
#: computed beside it must be faster by this than one whose results do not.
LAYOUT_GAIN, STEADY_GAIN = 1.03, 1.02

#: Where nothing is known of speed: from so many columns on in tiled products, as ggml does; with exact tiles, from
#: there on where they were slower on every processor that was tried.
TILED_FROM, TILED_FROM_TILES = 8, 16


@dataclass(frozen=True, slots=True)
class Choice:
    """How products of one type are computed. ``layout`` is "" for that of the file, or ``repack`` or ``amx``; of
    attention, the way.

    ``by_columns``: for each class of columns (1, 2 to 3, 4 to 7 …) the way for weights that lie as in the file; of
    weights in another layout those matrices are computed so that do not fit it.
    """

    type: int
    layout: str = ""
    by_columns: tuple[str, ...] = ("auto",) * len(CLASSES)
    layouts: tuple[str, ...] = field(default=())  # those that weights may be loaded into

    def way_for(self, columns: int) -> str:
        return self.layout or self.by_columns[min(columns.bit_length() - 1, len(CLASSES) - 1)]

    def to_json(self) -> dict[str, Any]:
        return {"type": self.type, "layout": self.layout, "by_columns": self.by_columns, "layouts": self.layouts}

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Choice:
        """Raises KeyError or TypeError for what is none."""
        return cls(fields["type"], fields["layout"], tuple(fields["by_columns"]), tuple(fields["layouts"]))


def takes_attention(found: Sequence[Found]) -> bool:
    """Whether attention is computed for several heads at a time: where that is right, and not slower."""
    usable = {each.way: each for each in found if each.may_be_used}
    if "attention" not in usable or "plain" not in usable:
        return "attention" in usable
    times = {way: min((min(by.values()) for by in each.times.values()), default=0.0) for way, each in usable.items()}
    return times["attention"] <= STEADY_GAIN * times["plain"]


def choose(found: Sequence[Found], shape: str = "", named: str = "auto") -> Choice:
    """The choice for one type. ``shape``: the one whose times decide; none: as ggml would choose among what is right.

    ``named``: the way that a user wants wherever it can be had; what it cannot compute goes the plain way.
    """
    usable = {each.way: each for each in found if each.may_be_used}
    kind = found[0].type
    if kind == ATTENTION:
        takes = named != "plain" and takes_attention(found)
        return Choice(kind, "attention" if takes else "plain")
    if named != "auto":
        return _named(kind, named, named in usable)
    timed = {way: each.times[shape] for way, each in usable.items() if each.times.get(shape)}
    if not timed:
        return _untimed(kind, usable)
    in_file = {way: by for way, by in timed.items() if way not in LAYOUTS}
    by_timed = {m: _fastest(in_file, usable, m) for m in TIMED}
    costs = {"": {m: in_file[way][m] for m, way in by_timed.items() if way}}
    costs |= {way: timed[way] for way in LAYOUTS if way in timed}
    common = set.intersection(*(set(times) for times in costs.values() if times))
    best = min(costs, key=lambda layout: _score(costs[layout], common) * (LAYOUT_GAIN if layout else 1.0))
    last = _last(usable)
    by_columns = tuple(by_timed[m] or last for m in CLASSES)
    return Choice(kind, best, by_columns, (best,) if best else ())


def _fastest(timed: dict[str, dict[int, float]], usable: dict[str, Found], m: int) -> str:
    """The way for so many columns of weights as they lie in the file; "" where none was timed."""
    of_m = {way: by[m] for way, by in timed.items() if m in by}
    if not of_m:
        return ""
    return min(of_m, key=lambda way: of_m[way] * (1.0 if usable[way].is_steady else STEADY_GAIN))


def _score(times: dict[int, float], common: set[int]) -> float:
    """The weighted mean of the logarithms, as a time, over the numbers of columns that all layouts were timed with."""
    if not times:
        return math.inf
    total = sum(WEIGHTS[m] for m in common) or 1.0
    return math.exp(sum(WEIGHTS[m] * math.log(times[m]) for m in common) / total)


def _last(usable: Mapping[str, Found]) -> str:
    """What computes where nothing else can: the plain way, unless that one is wrong and another is right."""
    in_file = [way for way in WAYS if way not in LAYOUTS and way in usable]
    return in_file[-1] if in_file else "plain"


def _untimed(kind: int, usable: dict[str, Found]) -> Choice:
    layouts = tuple(way for way in LAYOUTS if way in usable)
    order = [way for way in WAYS if way not in LAYOUTS and way in usable]
    tiled_from = TILED_FROM_TILES if "tiles" in usable else TILED_FROM
    last = _last(usable)
    by_columns = tuple(next((w for w in order if w != "tiled" or m >= tiled_from), last) for m in CLASSES)
    return Choice(kind, layouts[0] if layouts else "", by_columns, layouts)


def _named(kind: int, named: str, is_usable: bool) -> Choice:
    if not is_usable:
        return Choice(kind, "", ("plain",) * len(CLASSES))
    if named in LAYOUTS:
        return Choice(kind, named, ("plain",) * len(CLASSES), (named,))
    return Choice(kind, "", (named,) * len(CLASSES))
