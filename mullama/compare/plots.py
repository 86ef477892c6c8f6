"""Figures of a comparison as PNG and SVG. matplotlib comes with the extra ``plots`` and is imported when it is used."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mullama.compare.runner import Run
from mullama.errors import ConfigError
from mullama.workload.base import Outcome
from mullama.workload.metrics import itl_s, percentile, ttft_s

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_POINTS = 400  # of one curve
_PANELS = 4  # classes shown side by side
_STYLES = ("-", "--", ":", "-.")
_COLOURS = 10  # of matplotlib's default cycle

#: Outcomes by policy, in the order of the comparison.
Played = Mapping[str, Sequence[Outcome]]


def require_matplotlib() -> None:
    """Raise ConfigError, naming the extra, when matplotlib is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ConfigError("plots need matplotlib: pip install 'mullama[plots]', or give --no-plots") from None


def write_plots(folder: Path, runs: Sequence[Run]) -> list[Path]:
    """Draw every figure of the runs into ``folder``. Returns the files. Raises ConfigError without matplotlib."""
    require_matplotlib()
    from matplotlib import rc_context

    played: dict[str, list[Outcome]] = {}
    for run in sorted(runs, key=lambda run: run.round):
        played.setdefault(run.policy, []).extend(run.outcomes)
    files = []
    # A fixed salt and no date: the same numbers give the same file.
    with rc_context({"svg.hashsalt": "mullama", "axes.grid": True, "axes.axisbelow": True, "grid.alpha": 0.3}):
        for name, draw in _FIGURES.items():
            figure = _figure(played, draw)
            for suffix, metadata in ((".png", {"Software": None}), (".svg", {"Date": None})):
                file = folder / f"{name}{suffix}"
                figure.savefig(file, metadata=metadata, dpi=150)
                files.append(file)
    return files


def _figure(played: Played, draw: Callable[[Axes, Played], None]) -> Figure:
    """One panel for each class of the workload, or a single one."""
    from matplotlib.figure import Figure

    groups = sorted({outcome.request.group for outcomes in played.values() for outcome in outcomes})
    if not 1 < len(groups) <= _PANELS:
        groups = []
    figure = Figure(figsize=(6.4 * max(len(groups), 1), 4.4), layout="constrained")
    panel_groups: list[str | None] = [*groups] or [None]
    panels = figure.subplots(1, max(len(groups), 1), squeeze=False)[0]
    for axes, group in zip(panels, panel_groups, strict=True):
        part = {
            label: [o for o in outcomes if group is None or o.request.group == group]
            for label, outcomes in played.items()
        }
        draw(axes, part)
        if group is not None:
            axes.set_title(group or "other")
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize="small")
    return figure


def _style(position: int) -> dict[str, Any]:
    return {"color": f"C{position % _COLOURS}", "linestyle": _STYLES[position // _COLOURS % len(_STYLES)]}


def _ttfts(outcomes: Sequence[Outcome]) -> list[float]:
    return [ttft * 1e3 for outcome in outcomes if (ttft := ttft_s(outcome)) is not None]


def _itls(outcomes: Sequence[Outcome]) -> list[float]:
    return [gap * 1e3 for outcome in outcomes if outcome.error is None for gap in itl_s(outcome)]


def _cdf(axes: Axes, samples: Mapping[str, list[float]], what: str) -> None:
    for position, (label, values) in enumerate(samples.items()):
        if values:
            ordered = sorted(values)
            last = len(ordered) - 1
            ranks = sorted({round(i * last / _POINTS) for i in range(_POINTS + 1)})
            x, y = [ordered[rank] for rank in ranks], [(rank + 1) / len(ordered) for rank in ranks]
            axes.step(x, y, where="post", label=label, **_style(position))
    axes.set_xlabel(f"{what} (ms)")
    axes.set_ylabel("share of the samples")
    low, high = _limits(samples.values())
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlim(low, high)
    axes.set_ylim(0, 1)


def _limits(samples: Iterable[Sequence[float]]) -> tuple[float, float]:
    """From a little before the first percentile to a little behind the largest: the curves fill the axis.

    Gaps between tokens of one step are nearly 0; they are what the curve begins above 0 with.
    """
    every = sorted(max(value, 1e-3) for values in samples for value in values)
    if not every:
        return 1.0, 10.0
    return every[len(every) // 100] / 1.15, max(every[-1] * 1.15, every[len(every) // 100] * 1.5)


def _ttft_cdf(axes: Axes, played: Played) -> None:
    _cdf(axes, {label: _ttfts(outcomes) for label, outcomes in played.items()}, "time to the first token")


def _itl_cdf(axes: Axes, played: Played) -> None:
    _cdf(axes, {label: _itls(outcomes) for label, outcomes in played.items()}, "time between tokens")


def _ttft_over_time(axes: Axes, played: Played) -> None:
    for position, (label, outcomes) in enumerate(played.items()):
        points = [(o.request.at_s, ttft * 1e3) for o in outcomes if (ttft := ttft_s(o)) is not None]
        if points:
            x, y = zip(*points, strict=True)
            axes.plot(x, y, marker=".", markersize=4, alpha=0.7, label=label, color=_style(position)["color"], ls="")
    axes.set_xlabel("arrival (s)")
    axes.set_ylabel("time to the first token (ms)")
    axes.set_ylim(bottom=0)


def _ttft_bars(axes: Axes, played: Played) -> None:
    for offset, q in ((-0.2, 50), (0.2, 99)):
        heights = [percentile(_ttfts(outcomes), q) or 0.0 for outcomes in played.values()]
        bars = axes.bar([i + offset for i in range(len(heights))], heights, width=0.38, label=f"p{q}")
        axes.bar_label(bars, fmt="%.0f", fontsize="x-small")
    axes.set_xticks(range(len(played)), list(played), rotation=20, ha="right")
    axes.set_ylabel("time to the first token (ms)")


_FIGURES: dict[str, Callable[[Axes, Played], None]] = {
    "ttft-cdf": _ttft_cdf,
    "itl-cdf": _itl_cdf,
    "ttft-over-time": _ttft_over_time,
    "ttft-percentiles": _ttft_bars,
}
