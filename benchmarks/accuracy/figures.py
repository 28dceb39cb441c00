"""Figures of the accuracy table as SVG: seed dots, learning curves, panels. Without matplotlib there are none."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks.accuracy.run import Table

Result = Mapping[str, Any]


def draw_figures(table: "Table", results: Sequence[Result], folder: Path) -> dict[str, list[str]]:
    """Per setting the names of the files that were drawn into `folder`."""
    try:
        import matplotlib as mpl
    except ModuleNotFoundError:
        print("no figures: `pip install matplotlib` (or rsseg's extra `dev`) draws them")
        return {}
    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "rsseg"  # the same figure is the same file
    folder.mkdir(parents=True, exist_ok=True)
    drawn: dict[str, list[str]] = {}
    for ready in table.ready:
        setting, arms = ready.setting.name, [arm.name for arm in ready.arms]
        cells = [r for r in results if r["setting"] == setting and r["score"] and "test" in r and r["arm"] in arms]
        if cells:
            drawn[setting] = [
                _dots(cells, arms, folder / f"{setting}-seeds.svg"),
                _curves(cells, arms, folder / f"{setting}-curves.svg"),
                *_panels(cells, arms, folder / f"{setting}-panels.svg"),
            ]
    return drawn


def _dots(cells: Sequence[Result], arms: Sequence[str], file: Path) -> str:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 0.6 + 0.4 * len(arms)), layout="constrained")
    axes = figure.subplots()
    for row, arm in enumerate(reversed(arms)):
        values = [r["test"]["miou"] for r in cells if r["arm"] == arm]
        axes.plot(values, [row] * len(values), "o", color="tab:blue", alpha=0.7)
        if values:
            axes.plot([sum(values) / len(values)], [row], "|", color="black", markersize=14)
    axes.set_yticks(range(len(arms)), list(reversed(arms)))
    axes.set_xlabel("test mIoU; a dot per seed, a bar for their mean")
    axes.grid(axis="x", alpha=0.3)
    return _saved(figure, file)


def _curves(cells: Sequence[Result], arms: Sequence[str], file: Path) -> str:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for number, arm in enumerate(arms):
        curves = [dict(map(tuple, r["curve"])) for r in cells if r["arm"] == arm]
        if not curves:
            continue
        steps = sorted(set.intersection(*(set(curve) for curve in curves)))
        means = [sum(curve[step] for curve in curves) / len(curves) for step in steps]
        axes.plot(steps, means, marker=".", label=arm, color=f"C{number}")
    axes.set_xlabel("steps")
    axes.set_ylabel("validation mIoU, mean over seeds")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    return _saved(figure, file)


def _panels(cells: Sequence[Result], arms: Sequence[str], file: Path) -> list[str]:
    """Input and truth, then each arm's prediction, of the first seed."""
    import matplotlib.image as mpimg
    from matplotlib.figure import Figure

    first = {arm: next((r for r in cells if r["arm"] == arm), None) for arm in arms}
    shown = [(arm, Path(r["folder"])) for arm, r in first.items() if r is not None]
    numbers = [n for n in range(9) if all((folder / f"panel{n}-prediction.png").is_file() for _, folder in shown)]
    if not shown or not numbers:
        return []
    figure = Figure(figsize=(1.7 * (2 + len(shown)), 1.9 * len(numbers)), layout="constrained")
    axes = figure.subplots(len(numbers), 2 + len(shown), squeeze=False)
    columns = [("input", shown[0][1], "input"), ("truth", shown[0][1], "truth")]
    columns += [(arm, folder, "prediction") for arm, folder in shown]
    for row, number in enumerate(numbers):
        for axis, (title, folder, what) in zip(axes[row], columns, strict=True):
            axis.imshow(mpimg.imread(folder / f"panel{number}-{what}.png"), interpolation="nearest")
            axis.set_axis_off()
            if row == 0:
                axis.set_title(title, fontsize=7)
    return [_saved(figure, file)]


def _saved(figure: Any, file: Path) -> str:
    figure.savefig(file, dpi=100, metadata={"Date": None})
    return file.name
