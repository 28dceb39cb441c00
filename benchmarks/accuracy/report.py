"""docs/results.md, its CSV and figures, made from the results of the cells; nothing here is typed by hand."""

import csv
import json
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.accuracy.figures import draw_figures
from benchmarks.accuracy.jobs import AUGMENT
from benchmarks.accuracy.run import Ready, Table
from rsseg.files import write_text

Result = dict[str, Any]

RULES = """\
This page is made by `python -m benchmarks.accuracy`; no number in it was typed. The recipes are in
`benchmarks/accuracy/recipes`.

- Within a table all arms train for the same number of steps, on crops of the same size, in batches of the same size,
  with the same augmentation. What a method adds (teachers, pseudo-labels) costs it time, which is shown.
- An arm that starts from the model of another arm, or learns from it as its teacher, uses that model of the same
  setting and seed. The steps of that model come on top. An arm called *twice as long* is plain training with as many
  steps as a plain run and an arm that starts from it have together; the difference to it is given below the table.
- Each arm's learning rate is chosen by the same sweep on the validation images: per dataset, with one seed and fewer
  steps. Single switches of a method's stronger mode, and runs of twice the length, take the rate of the arm they vary.
- The weights that are scored are those with the best validation mIoU. They score the test images once.
- *mIoU* is the mean over all classes of the intersection over union on the test images, from one confusion matrix.
- *against plain* is the mean over seeds of the difference to plain training of the same network with the same seed,
  and the standard deviation of that difference. *verdict* compares the means of the seeds that both have: `better` or
  `worse` if they differ by more than the pooled standard deviation of the two arms, else `equal`; `-` for one seed.
- All cells that ran are shown, the worse ones too. Cells that did not run yet are listed at the end.
- Why an arm gains or loses is said on the page of its method: [KTDA](ktda.md#does-it-help),
  [RS-MTDF](mtdf.md#the-stronger-mode), [ST-DASegNet](dasegnet.md#ablations-and-the-stronger-mode-of-two-students).
- The settings of the adaptation mode were chosen after a look at scores on the target's training images, whose labels
  no training uses; [dasegnet.md](dasegnet.md) has these scores.
"""

COLUMNS = (
    "setting",
    "arm",
    "method",
    "seed",
    "rate",
    "lr",
    "steps",
    "score",
    "val_miou",
    "best_step",
    "test_miou",
    "test_mf1",
    "test_oa",
    "seconds",
    "cpu_seconds",
    "parameters",
    "trainable",
    "megapixels_per_s",
    "processor",
    "code",
    "date",
    "error",
)


def write_report(table: Table, docs: Path) -> Path:
    """Write results.md, results.csv and the folder results/ with figures into `docs`; returns the page."""
    docs.mkdir(parents=True, exist_ok=True)
    results = read_results(table.output)
    figures = draw_figures(table, results, docs / "results")
    parts = ["# Accuracy\n", RULES, _conditions(table, results), _overview(table, results)]
    for ready in table.ready:
        if arms := [arm for arm in ready.arms if cells_of(results, ready.setting.name, arm.name)]:
            shown = replace(ready, arms=tuple(arms))
            parts.append(_section(table, shown, results, figures.get(ready.setting.name, ())))
    parts.append(_left_out(table, results))
    write_csv(docs / "results.csv", results)
    page = docs / "results.md"
    write_text(page, "\n".join(parts))
    return page


def read_results(output: Path) -> list[Result]:
    """Every result below `output`: of each cell and each rate the newest, cells before sweeps."""
    newest: dict[tuple[Any, ...], Result] = {}
    for file in sorted(output.glob("cells/*/*/*/result.json"), key=lambda file: file.stat().st_mtime):
        result = json.loads(file.read_text()) | {"folder": str(file.parent)}
        seed, rate = (result["seed"], None) if result["score"] else (None, result["rate"])
        newest[result["setting"], result["arm"], seed, rate] = result
    order = ("setting", "arm", "score", "seed", "rate")
    return sorted(newest.values(), key=lambda r: [(not r[k] if k == "score" else r[k]) for k in order])


def cells_of(results: Iterable[Result], setting: str, arm: str) -> list[Result]:
    """The scored cells of an arm, by seed."""
    return [r for r in results if r["setting"] == setting and r["arm"] == arm and r["score"] and "test" in r]


def write_csv(file: Path, results: Sequence[Result]) -> None:
    """One row per cell and per run of a sweep."""
    with file.open("w", newline="", encoding="utf-8") as opened:
        writer = csv.DictWriter(opened, COLUMNS, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        for result in results:
            test = {f"test_{name}": value for name, value in result.get("test", {}).items()}
            writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in (result | test).items()})


def paired(results: Sequence[Result], setting: str, arm: str, plain: str | None) -> list[float]:
    """Per seed that both have: the arm's test mIoU less that of its plain arm."""
    base = {r["seed"]: r["test"]["miou"] for r in cells_of(results, setting, plain or "")}
    return [r["test"]["miou"] - base[r["seed"]] for r in cells_of(results, setting, arm) if r["seed"] in base]


def verdict(results: Sequence[Result], setting: str, arm: str, plain: str) -> str:
    """`better`, `worse` or `equal` by the pooled standard deviation of the seeds that both arms have; `-` for one."""
    own, base = ({r["seed"]: r["test"]["miou"] for r in cells_of(results, setting, name)} for name in (arm, plain))
    seeds = sorted(own.keys() & base.keys())
    if len(seeds) < 2:
        return "-"
    pooled = statistics.mean(statistics.variance(scores[seed] for seed in seeds) for scores in (own, base)) ** 0.5
    difference = statistics.mean(own[seed] - base[seed] for seed in seeds)
    return "equal" if abs(difference) <= pooled else "better" if difference > 0 else "worse"


def spread(values: Sequence[float], *, sign: bool = False) -> str:
    """Mean and standard deviation, or the one value."""
    if not values:
        return "-"
    mean = f"{statistics.mean(values):{'+' if sign else ''}.3f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.3f}"


def _conditions(table: Table, results: Sequence[Result]) -> str:
    profile = table.profile
    processors = sorted({r["processor"] for r in results if "processor" in r})
    codes = sorted({r["code"] for r in results})
    versions = sorted(
        {f"torch {r['versions']['torch']}, timm {r['versions']['timm']}" for r in results if "versions" in r}
    )
    augment = ", ".join(f"{key} {value}" for key, value in AUGMENT.items())
    lines = [
        "## Conditions\n",
        f"- Profile `{profile.name}`: {profile.steps} steps, crops of {profile.crop} pixels, "
        f"batch {profile.batch_size}, seeds {', '.join(map(str, profile.seeds))}; sweep of {len(profile.rates)} rates "
        f"({', '.join(f'x{rate:g}' for rate in profile.rates)}) with {profile.sweep_steps} steps each.",
        f"- Augmentation: {augment}.",
        *(["- Images of Dubai at half resolution."] if profile.half else []),
        f"- Processor: {'; '.join(processors) or '-'}. {'; '.join(versions)}. "
        f"Hash of the code: {', '.join(codes) or '-'}.",
        "- *training* is the time of one training with its validations. On a CPU it is the process's own time on one "
        "core, since other work may run beside it. *Mpx/s* is the rate of the shipped network in the tiled predictor, "
        "likewise.",
    ]
    return "\n".join(lines) + "\n"


def _overview(table: Table, results: Sequence[Result]) -> str:
    """Every arm that ran with several seeds against its plain arm, by setting."""
    cells: dict[str, dict[str, str]] = defaultdict(dict)
    for ready in table.ready:
        for arm in ready.arms:
            setting = ready.setting.name
            if arm.plain and (found := verdict(results, setting, arm.name, arm.plain)) != "-":
                difference = spread(paired(results, setting, arm.name, arm.plain), sign=True)
                cells[_title(results, setting, arm.name)][setting] = f"{difference} {found}"
    if not cells:
        return ""
    ran = {setting for row in cells.values() for setting in row}
    shown = [ready.setting for ready in table.ready if ready.setting.name in ran]
    rows = [[title, *(row.get(setting.name, "-") for setting in shown)] for title, row in cells.items()]
    head = ["against plain", *(setting.title for setting in shown)]
    return "\n".join(["## Overview\n", "Arms with at least two seeds.\n", _markdown([head, *rows])]) + "\n"


def _section(table: Table, ready: Ready, results: Sequence[Result], figures: Sequence[str]) -> str:
    setting = ready.setting
    lines = [f"## {setting.title}\n"]
    seeds = table.profile.seeds
    head = ["arm", "mIoU", "against plain", "verdict", *(f"seed {s}" for s in seeds), "val. mIoU", "rate", "training"]
    rows = [_row(results, setting.name, arm.name, arm.plain, seeds) for arm in ready.arms]
    lines += [_markdown([[*head, "M param.", "Mpx/s"], *rows])]
    lines += _needs(results, ready)
    classes = _classes(results, setting.name, [arm.name for arm in ready.arms])
    lines += ["\nIoU by class, mean over seeds:\n", _markdown(classes)] if len(classes) > 1 else []
    lines += [f"\n![{setting.title}](results/{name})" for name in figures]
    lines += _sweeps(results, setting.name)
    errors = [r for r in results if r["setting"] == setting.name and "error" in r]
    lines += [f"\nFailed: {r['arm']}, seed {r['seed']}: {r['error']}" for r in errors]
    return "\n".join(lines) + "\n"


def _row(results: Sequence[Result], setting: str, arm: str, plain: str | None, seeds: Sequence[int]) -> list[str]:
    cells = cells_of(results, setting, arm)
    by_seed = {r["seed"]: f"{r['test']['miou']:.3f}" for r in cells}
    seconds = [r["cpu_seconds"] or r["seconds"] for r in cells if r.get("cpu_seconds") or r.get("seconds")]
    return [
        _title(results, setting, arm),
        spread([r["test"]["miou"] for r in cells]),
        spread(paired(results, setting, arm, plain), sign=True) if plain else "plain",
        verdict(results, setting, arm, plain) if plain else "",
        *(by_seed.get(seed, "-") for seed in seeds),
        spread([r["val_miou"] for r in cells]),
        f"{cells[0]['lr']:.2g}" if cells else "-",
        f"{statistics.median(seconds) / 60:.1f} min" if seconds else "-",
        f"{cells[0]['parameters'] / 1e6:.1f}" if cells else "-",
        f"{statistics.median(r['megapixels_per_s'] for r in cells):.2f}" if cells else "-",
    ]


def _needs(results: Sequence[Result], ready: Ready) -> list[str]:
    """Which models arms build on, and what remains against plain training with as many steps in all."""
    titles = {arm.name: _title(results, ready.setting.name, arm.name) for arm in ready.arms}
    lines = []
    for arm in ready.arms:
        for key, name in arm.needs:
            own = spread([r["test"]["miou"] for r in cells_of(results, ready.setting.name, name)])
            text = f"- {titles[arm.name]}: `{key}` is the model of {titles.get(name, name)} (test mIoU {own})"
            if key == "start":
                difference = spread(paired(results, ready.setting.name, arm.name, arm.long), sign=True)
                text += f"; against {titles.get(arm.long or '', arm.long)}, with as many steps in all: {difference}"
            lines.append(text)
    return ["\nSteps of another arm come on top of those of its table row:\n", *lines] if lines else []


def _title(results: Sequence[Result], setting: str, arm: str) -> str:
    cells = cells_of(results, setting, arm)
    return str(cells[0]["title"]) if cells else arm


def _classes(results: Sequence[Result], setting: str, arms: Sequence[str]) -> list[list[str]]:
    cells = {arm: cells_of(results, setting, arm) for arm in arms}
    names = next((list(found[0]["test_iou"]) for found in cells.values() if found), [])
    rows = [
        [found[0]["title"], *(_mean(r["test_iou"].get(name) for r in found) for name in names)]
        for found in cells.values()
        if found
    ]
    return [["arm", *names], *rows]


def _mean(values: Iterable[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{statistics.mean(known):.3f}" if known else "-"


def _sweeps(results: Sequence[Result], setting: str) -> list[str]:
    sweeps: dict[str, list[Result]] = defaultdict(list)
    for result in results:
        if result["setting"] == setting and not result["score"] and result.get("val_miou") is not None:
            sweeps[result["arm"]].append(result)
    if not sweeps:
        return ["\nThe learning rates are those of another setting on this dataset."]
    lines = ["\nSweep, validation mIoU by rate: "]
    for arm, found in sweeps.items():
        lines.append(f"- {arm}: " + ", ".join(f"{r['lr']:.2g} {r['val_miou']:.3f}" for r in found))
    return lines


def _left_out(table: Table, results: Sequence[Result]) -> str:
    absent: dict[tuple[str, str], list[str]] = defaultdict(list)
    for ready, arm, seed in table.cells():
        if not any(r["seed"] == seed for r in cells_of(results, ready.setting.name, arm.name)):
            absent[ready.setting.name, arm.name].append(str(seed))
    missing = [f"- {setting}, {arm}: seeds {', '.join(seeds)}" for (setting, arm), seeds in absent.items()]
    lines = ["## Not run yet\n", *(f"- {line}" for line in table.left_out), *missing]
    return (
        "\n".join(lines if len(lines) > 1 else [*lines, "Nothing: every cell of the profile is in the tables."]) + "\n"
    )


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    head, *body = rows
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in body)])
