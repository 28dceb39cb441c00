"""The page of `benchmarks.economy`: tables, rank correlations and figures from kept results."""

import statistics
import textwrap
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

mpl.use("svg")
_LEAST_PAIRS = 4
"""Pairs of a dataset that a rank correlation is worth printing for."""
Record = dict[str, Any]


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Rank correlation; equal values share their mean rank."""

    def ranks(values: Sequence[float]) -> NDArray[np.float64]:
        array = np.array(values)
        return np.array([(array < v).sum() + ((array == v).sum() - 1) / 2 for v in array])

    return float(np.corrcoef(ranks(a), ranks(b))[0, 1])


def figure(file: Path, panels: Sequence[tuple[str, str, str, Sequence[float], Sequence[float], str]]) -> None:
    """Draw panels beside each other: title, x label, y label, x, y, format."""
    mpl.rcParams["svg.hashsalt"] = "rsseg"  # the same figure is the same file
    drawn = Figure(figsize=(4 * len(panels), 3.2), layout="constrained")
    for axes, (title, x_label, y_label, x, y, style) in zip(
        drawn.subplots(1, len(panels), squeeze=False)[0], panels, strict=True
    ):
        axes.plot(x, y, style)
        axes.set(title=title, xlabel=x_label, ylabel=y_label)
    file.parent.mkdir(parents=True, exist_ok=True)
    drawn.savefig(file, metadata={"Date": None})


def prose(text: str) -> list[str]:
    """A paragraph in lines, and an empty one."""
    return [*textwrap.wrap(" ".join(text.split()), 118), ""]


def page(kept: Mapping[str, Sequence[Record]], file: Path, *, network: str, steps: int) -> str:
    """Results of each kind as Markdown; figures are drawn into the folder `results` beside the page."""
    about = f"""Made by `python -m benchmarks.economy page docs/results-trust.md` from the results of its commands
    `gap`, `trust`, `calibration` and `speed`; no number was typed. The networks of the first two are plain
    {network}, trained for {steps} steps on two thirds of the labeled images of one domain, with one seed; scores
    are far below those of a full training."""
    parts = (
        ("Does the distance tell the loss?", gap_lines, "gap"),
        ("Does applicability tell the errors?", trust_lines, "trust"),
        ("Does the temperature mend the probabilities?", calibration_lines, "calibration"),
        ("Time", speed_lines, "speed"),
    )
    lines = ["# How far distances may be trusted", "", *prose(about)]
    for title, write, kind in parts:
        records = kept[kind]
        body = write(records, file.parent / "results") if records else ["Not measured.", ""]
        lines += [f"## {title}", "", *body]
    return "\n".join(lines)


def gap_lines(records: Sequence[Record], folder: Path) -> list[str]:
    """Distance of each pair of domains, loss of mIoU between them, and their rank correlation."""
    lines = prose(
        """`rsseg dataset gap` of two domains, and the loss of mIoU when the network of one is used on the other:
        the mean of both directions, so that it does not matter which domain is the more difficult one. *halves*
        is the distance between random halves of the first domain (95th percentile). Domains of Dubai are
        five of its large tiles."""
    )
    lines += ["| dataset | domains | images | distance | halves | loss of mIoU |", "|---|---|---|---|---|---|"]
    records = sorted(records, key=lambda r: (r["data"], r["distance"]))
    distance, loss = [r["distance"] for r in records], []
    for r in records:
        (own, other), (back, theirs) = r["scores"]
        loss.append((own - other + theirs - back) / 2)
        lines.append(
            f"| {r['data']} | {r['first']}, {r['second']} | {r['images'][0]}, {r['images'][1]} | {r['distance']:.3f} "
            f"| {r['same']:.3f} | {loss[-1]:+.3f} |"
        )
    lines += ["", "| pairs | domains | Spearman's rank correlation | 95 % of shuffled domains |", "|---|---|---|---|"]
    for name in ("all datasets", *dict.fromkeys(r["data"] for r in records)):
        used = [i for i, r in enumerate(records) if name in ("all datasets", r["data"])]
        found = {(records[i]["data"], records[i][end]) for i in used for end in ("first", "second")}
        if len(used) >= _LEAST_PAIRS:
            pair = [distance[i] for i in used], [loss[i] for i in used]
            bound = shuffled(records, used, loss) if name != "all datasets" else None
            lines.append(
                f"| {len(used)}, {name} | {len(found)} | {spearman(*pair):.2f} | "
                f"{'-' if bound is None else format(bound, '.2f')} |"
            )
    lines += [
        "",
        *prose(
            f"""{len(records)} pairs are few, and they are not independent: a domain is part of several. The last column
            is what 95 % of random permutations of a dataset's domains stay below; a correlation above it is
            unlikely by chance in that dataset. Nothing is proven for other sensors or resolutions, nor the border
            between moderate and far."""
        ),
    ]
    figure(folder / "trust-gap.svg", [("pairs of domains", "distance", "loss of mIoU", distance, loss, "o")])
    return [*lines, "![Distance and loss of pairs of domains](results/trust-gap.svg)", ""]


def shuffled(records: Sequence[Record], used: Sequence[int], loss: Sequence[float]) -> float | None:
    """95th percentile of the correlation if the domains of the losses are permuted (Mantel 1967).

    None if some pairs of these domains were not measured.
    """
    names = sorted({records[i][end] for i in used for end in ("first", "second")})
    lost = {frozenset((records[i]["first"], records[i]["second"])): loss[i] for i in used}
    if len(lost) < len(names) * (len(names) - 1) // 2:
        return None
    rng, found = np.random.default_rng(0), []
    for _ in range(1000):
        new = dict(zip(names, rng.permutation(names).tolist(), strict=True))
        own = [lost[frozenset((new[records[i]["first"]], new[records[i]["second"]]))] for i in used]
        found.append(spearman([records[i]["distance"] for i in used], own))
    return float(np.quantile(found, 0.95))


def trust_lines(records: Sequence[Record], folder: Path) -> list[str]:
    """Error rate per decile of the layer."""
    lines = prose(
        """Error rate of the labeled pixels per tenth of the `--applicability` layer, from the most to the least
        applicable pixels, with the mean of the layer in brackets. *to* is the other domain alone, *with* adds
        the test images of the network's own domain. *by confidence* are the tenths of the `--confidence` layer
        instead, on the pixels of *to*."""
    )
    lines += ["| network, pixels | " + " | ".join(str(n) for n in range(1, 11)) + " | rises |", "|---" * 12 + "|"]
    panels, ranks, rising, confident = [], [], 0, 0
    for r in records:
        for which, word in (("target", "to"), ("both", "with"), ("confidence", "to")):
            errors = [error for _, error in r["deciles"][which]]
            steps = sum(b > a for a, b in pairwise(errors))
            title = f"{r['data']} {r['source']} {word} {r['target']}"
            cells = " | ".join(f"{error:.3f} ({value:.2f})" for value, error in r["deciles"][which])
            rank = spearman(range(10), errors)
            if which == "confidence":
                title += ", by confidence"
                confident += steps == len(errors) - 1
            else:
                rising += steps == len(errors) - 1
                ranks.append(rank)
            lines.append(f"| {title} | {cells} | {steps} of 9 steps, rank correlation {rank:.2f} |")
            panels.append((title, "tenth, lowest values last", "error rate", range(1, 11), errors, "o-"))
    figure(folder / "trust-deciles.svg", panels[::3])
    words = f"The goal, an error rate that rises with every tenth, is reached in {rising} of {len(ranks)} rows."
    if falling := sum(rank < 0 for rank in ranks):
        words += f" In {falling} rows errors fall instead: there the strange pixels are the easy ones."
    if rising < len(ranks):
        words += f""" So the layer says how unlike the training data the surroundings of a pixel are; it does not
        order the pixels of a scene by their errors. By confidence, the error rate rises with every tenth in {confident}
        of {len(records)} rows."""
    return [*lines, "", *prose(words), "![Error rate per tenth of the layer](results/trust-deciles.svg)", ""]


def calibration_lines(records: Sequence[Record], _folder: Path) -> list[str]:
    """Errors per setting and arm, means over the seeds."""
    lines = prose(
        """Expected calibration error on the test images, 15 bins, of networks of the [accuracy table](results.md), and
        of a packaged recipe trained for its own number of steps on the table's data and crops, as trained and with the
        temperature that the training fitted on its validation images. The goal is half the error. Means over the
        seeds; the ratios of the single seeds are in brackets."""
    )
    lines += ["| setting | network | seeds | temperature | as trained | with temperature | ratio |", "|---" * 7 + "|"]
    groups: dict[tuple[str, str], list[Record]] = {}
    for r in records:
        groups.setdefault((r["setting"], r["title"]), []).append(r)
    reached = lowered = 0
    for (setting, title), own in groups.items():
        before, after, temperature = (
            statistics.mean(r[name] for r in own) for name in ("before", "after", "temperature")
        )
        reached += after <= before / 2
        lowered += after < before
        single = ", ".join(f"{r['after'] / r['before']:.2f}" for r in own)
        lines.append(
            f"| {setting} | {title} | {len(own)} | {temperature:.2f} | {before:.3f} | {after:.3f} | "
            f"{after / before:.2f} ({single}) |"
        )
    text = f"""The temperature lowers the error in {lowered} of {len(groups)} rows; the goal is reached in {reached}.
        It is fitted on the validation images, and helps as far as their errors resemble those on the test images."""
    return [*lines, "", *prose(text)]


def speed_lines(records: Sequence[Record], _folder: Path) -> list[str]:
    """Ratios of the last run of each kind."""
    lines = []
    for r in {r["name"]: r for r in records}.values():
        if "points" in r:
            words = f"{r['seconds']:.2f} s of processor time for {r['points']} points (goal 2 s)"
        else:
            words = (
                f"{statistics.median(r['ratios']):.2f} times the processor time of predicting the scene "
                f"[{min(r['ratios']):.2f}-{max(r['ratios']):.2f}], {len(r['ratios'])} rounds, alternately (goal 1.3)"
            )
        lines.append(f"- {r['name']}, {r['side']} x {r['side']} pixels: {words}.")
    return [*lines, ""]
