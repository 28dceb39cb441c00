"""Golden cases of ST-DASegNet outside the network: tiling, label colours, metrics, learning rates."""

from typing import Any

import numpy as np
import torch

from rsseg.config import ScheduleConfig
from rsseg.data.index import LabelMap
from rsseg.data.labels import LabelTable
from rsseg.datasets.cards import CARDS
from rsseg.datasets.prepare.tiles import whole_tile_origins
from rsseg.metrics import ConfusionMatrix, scores
from rsseg.training.optimizers import lr_at
from tests.golden.harness import Case, Handler

ISPRS_VALUES = {255: 0} | {index: index + 1 for index in range(6)}
PUBLISHED = {
    "potsdam": ("potsdam", ISPRS_VALUES),
    "vaihingen": ("vaihingen", ISPRS_VALUES),
    "GF-2": ("gid5", {255: 0, 0: 1, 1: 2, 2: 3, 3: 3, 4: 4}),  # meadow is merged into forest
    "CITY-OSM": ("city-osm", {0: 0, 1: 1, 2: 2}),
}
"""Name of a published script -> our card, and its value for each of our class indices."""


def check_tiling(case: Case) -> None:
    for row in case.meta["rows"]:
        tile, stride = row["clip"], row["stride"]
        step = tile if row["script"] == "potsdam" else stride
        columns = whole_tile_origins(row["width"], tile, stride, step=step)
        rows = whole_tile_origins(row["height"], tile, stride, step=step)
        assert (columns, rows) == (row["x_starts"], row["y_starts"])
        assert len(columns) * len(rows) == row["count"]
        assert [columns[-1] + tile, rows[-1] + tile] == row["covered"]
        card, _ = PUBLISHED[row["script"]]
        scene = scene_named(card, row["source_name"])
        for key, place in (("first_file", 0), ("last_file", -1)):
            x, y = columns[place], rows[place]
            assert f"{scene}_{x}_{y}_{x + tile}_{y + tile}.png" == row[key]


def scene_named(card: str, file: str) -> str:
    """The `{group}` that a card finds in the name of an image."""
    found = [
        values["group"]
        for variant in CARDS[card].variants
        for pattern in variant.layout.patterns()[:1]
        for values in (pattern.match(file), pattern.match(f"top/{file}"))
        if values is not None
    ]
    return found[0]


def check_label_colours(case: Case) -> None:
    image = case.tensors["rgb"].numpy().transpose(2, 0, 1)
    expected = case.tensors["label"].numpy()
    covered = np.full(expected.shape, False)
    rows, columns = (whole_tile_origins(side, 8, 8) for side in expected.shape)
    covered[: rows[-1] + 8, : columns[-1] + 8] = True
    name, published = PUBLISHED[case.meta["script"]]
    labels, rule = CARDS[name].choose_labels(None), CARDS[name].choose_rule("st-dasegnet")
    assert rule.ignore_unknown
    table = LabelTable(labels.label_map, len(labels.classes), unknown=rule.unknown_label)
    indices = table.indices(image, None, name=case.name)
    values = np.vectorize(published.__getitem__)(indices)
    np.testing.assert_array_equal(np.where(covered, values, 255), expected)


def check_metrics(case: Case) -> None:
    num_classes = int(case.meta["num_classes"])
    shift = 1 if case.meta["reduce_zero_label"] else 0
    stored = {value + shift: value for value in range(num_classes)} | ({0: 255} if shift else {}) | {255: 255}
    table = LabelTable(LabelMap(values=stored), num_classes)
    confusion = ConfusionMatrix(num_classes)
    for prediction, raw in zip(case.sequence("pred"), case.sequence("gt_raw"), strict=True):
        confusion.update(prediction, torch.from_numpy(table.indices(raw.numpy()[None], None, name=case.name)))
    result = scores(confusion.matrix, [str(i) for i in range(num_classes)])
    close(case, [result.oa], case.meta["result"]["aAcc"])
    for key, field in {
        "IoU": "iou",
        "Acc": "recall",
        "Fscore": "f1",
        "Precision": "precision",
        "Recall": "recall",
    }.items():
        close(case, [getattr(entry, field) for entry in result.classes], case.meta["result"][key])
    close(case, [result.miou], [case.meta["mIoU"]])
    close(case, [result.variants["mf1_nan_skipped"]], [case.meta["mFscore"]])


def close(case: Case, actual: list[float | None], expected: list[float | None]) -> None:
    known = [(a, e) for a, e in zip(actual, expected, strict=True) if e is not None]
    torch.testing.assert_close(
        torch.tensor([a for a, _ in known], dtype=torch.float64),
        torch.tensor([e for _, e in known], dtype=torch.float64),
        **case.tolerance("result"),
    )


def check_schedule(case: Case) -> None:
    hook: dict[str, Any] = case.meta["hook"]
    schedule = ScheduleConfig(
        warmup_steps=hook.get("warmup_iters", 0) if hook.get("warmup") else 0,
        warmup_start=hook.get("warmup_ratio", 1.0),
        warmup_style="mmcv",
        decay="poly",
        power=hook["power"],
        min_lr=hook["min_lr"],
    )
    total = int(case.meta.get("total_iters", 40000))
    for row in case.meta["rows"]:
        for module, rate in row["lr"].items():
            actual = lr_at(schedule, case.meta["base_lr"][module], row["iter"], total)
            torch.testing.assert_close(actual, rate, **case.tolerance("lr"))


HANDLERS: dict[str, Handler] = {
    "tiling": check_tiling,
    "label_colours": check_label_colours,
    "metrics": check_metrics,
    "lr_schedule": check_schedule,
}
