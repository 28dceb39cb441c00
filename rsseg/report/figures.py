"""Charts as SVG whose text and lines take the colour of the page."""

import io
import re
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from rsseg.evaluation.calibration import BINS, CalibrationScores

_INK = "#010203"
"""Stands for the colour of the page's text."""
COLORS = ("#2f6fde", "#d9622b", "#2a9d6f", "#9a5fd0", "#c79a1b", "#d64a86", "#4aa3b5", "#8a8a8a")
"""Readable on light and dark pages."""
_MOST_POINTS = 400
_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "rsseg",
    "font.family": "sans-serif",
    "font.size": 9,
    "text.parse_math": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.grid": True,
    "grid.alpha": 0.18,
    "grid.color": _INK,
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.6,
}

Line = tuple[Sequence[float], Sequence[float]]


def _drawn(draw: Callable[[Axes], None], *, label: str, size: tuple[float, float] = (4.6, 2.9)) -> str:
    """Draw one chart; `label` describes it to screen readers."""
    with rc_context(_STYLE):
        figure = Figure(figsize=size, layout="constrained")
        figure.patch.set_alpha(0)
        axes = figure.add_subplot()
        axes.patch.set_alpha(0)
        draw(axes)
        buffer = io.StringIO()
        FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None, "Creator": None})  # type: ignore[no-untyped-call]
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace(_INK, "currentColor")
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    return svg.replace("<svg", f'<svg role="img" aria-label="{escape(label, quote=True)}"', 1)


def line_chart(
    lines: Mapping[str, Line], *, title: str, x: str = "step", best: float | None = None, log: bool = False
) -> str:
    """Lines over steps, thinned to a few hundred points each; `best` marks one step."""

    def draw(axes: Axes) -> None:
        for place, (name, (steps, values)) in enumerate(lines.items()):
            every = max(1, len(steps) // _MOST_POINTS)
            kept = slice((len(steps) - 1) % every, None, every)  # the last point is always shown
            marker = "o" if len(steps) < 25 else None
            color = COLORS[place % len(COLORS)]
            axes.plot(steps[kept], values[kept], label=name, color=color, marker=marker, markersize=3)
        if best is not None:
            axes.axvline(best, color=_INK, linewidth=0.8, linestyle=":")
        if log and all(v > 0 for _, values in lines.values() for v in values):
            axes.set_yscale("log")
            # The default formatter writes powers as mathematics.
            axes.yaxis.set_major_formatter("{x:g}")
            low, high = axes.get_ylim()
            labeled = "2357" if high < 30 * low else "25" if high < 300 * low else ""
            axes.yaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in labeled else "")
        axes.set_title(title)
        axes.set_xlabel(x)
        if len(lines) > 1:
            # Below the axis, where it hides no line.
            axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=4 if len(lines) != 3 else 3)

    return _drawn(draw, label=f"{title} over {x}")


def reliability_chart(calibration: CalibrationScores) -> str:
    """Accuracy over confidence, before and after; the area of a dot is its share of the pixels."""

    def draw(axes: Axes) -> None:
        axes.plot((0, 1), (0, 1), color=_INK, linewidth=0.8, linestyle="--")
        shown = [("temperature 1", calibration.before), ("calibrated", calibration.after)]
        for color, (name, error) in zip(COLORS[1::-1], shown, strict=True):
            if error is None:
                continue
            full = [(b.confidence, b.accuracy, b.pixels) for b in error.bins if b.pixels]
            sizes = [6 + 160 * n / calibration.pixels for *_, n in full]
            xs, ys = [c for c, _, _ in full], [a for _, a, _ in full]
            ece = 0.0 if error.ece is None else error.ece
            axes.plot(xs, ys, color=color, label=f"{name}: error {ece:.3f}")  # type: ignore[arg-type]
            axes.scatter(xs, ys, s=sizes, color=color, alpha=0.7)  # type: ignore[arg-type]
        axes.set(xlim=(0, 1), ylim=(0, 1), xlabel=f"confidence ({BINS} bins)", ylabel="share of right pixels")
        axes.set_title("Reliability")
        axes.legend(loc="upper left")

    return _drawn(draw, label="Reliability: accuracy over confidence", size=(4.6, 3.6))


def difference_chart(rows: Sequence[tuple[str, float, float, float]], *, title: str) -> str:
    """Name, difference, and the ends of its interval, one below the other."""

    def draw(axes: Axes) -> None:
        for place, (_, value, low, high) in enumerate(reversed(rows)):
            color = COLORS[2] if low > 0 else COLORS[1] if high < 0 else COLORS[-1]
            axes.plot((low, high), (place, place), color=color, linewidth=3, solid_capstyle="round")
            axes.plot((value,), (place,), color=color, marker="o", markersize=6)
        axes.axvline(0, color=_INK, linewidth=0.8)
        axes.set_yticks(range(len(rows)), [name for name, *_ in reversed(rows)])
        axes.set_xlabel("difference with its 95 % interval")
        axes.set_title(title, wrap=True)

    return _drawn(draw, label=title, size=(4.6, 0.9 + 0.26 * len(rows)))
