"""DeepGlobe land cover."""

from rsseg.datasets.card import RGB, DatasetCard, Variant, color_labels
from rsseg.datasets.layouts import Layout
from rsseg.datasets.prepare.tiles import Grid
from rsseg.datasets.splits import SHARES, SplitRule, drawn_by_scene, drawn_tiles
from rsseg.task import Color

_CLASSES: tuple[tuple[str, Color], ...] = (
    ("urban", (0, 255, 255)),
    ("agriculture", (255, 255, 0)),
    ("rangeland", (255, 0, 255)),
    ("forest", (0, 255, 0)),
    ("water", (0, 0, 255)),
    ("barren", (255, 255, 255)),
)
_UNKNOWN: tuple[str, Color] = ("unknown", (0, 0, 0))
_SHARES = {"train": 0.6, "val": 0.2, "test": 0.2}
_FOLDERS = {
    **dict.fromkeys(("train", "land-train", "land_train"), "train"),
    **dict.fromkeys(("valid", "test", "land-valid", "land-test", "land_valid", "land_test"), "unlabeled"),
}

DEEPGLOBE = DatasetCard(
    name="deepglobe",
    title="land cover, 50 cm (DeepGlobe)",
    size="803 of 2448 px",
    license="DeepGlobe 2018 terms (research)",
    labels=(
        color_labels("land", "six classes; unknown is ignored", _CLASSES, ignored=[_UNKNOWN[1]]),
        color_labels("with-unknown", "unknown is a class, as RS-MTDF trains it", [*_CLASSES, _UNKNOWN]),
    ),
    variants=tuple(
        Variant(layout, RGB, labels)
        for labels in ("land", "with-unknown")
        for layout in (
            Layout("images/*_sat.jpg", "masks/*_mask.png", one_split="train"),
            Layout("images/*.jpg", "masks/*.png", one_split="train"),
            Layout("images/*.png", "masks/*.png", one_split="train"),
            Layout("{split}/*_sat.jpg", "{split}/*_mask.png", unlabeled=("unlabeled",), split_as=_FOLDERS),
            Layout("*_sat.jpg", "*_mask.png", one_split="train"),
        )
    ),
    rules=(
        SplitRule("scene", "60, 20 and 20 % of the labeled images, seeded", drawn_by_scene(_SHARES)),
        SplitRule(
            "rs-dwl",
            "512-pixel tiles of all labeled images shuffled into 60, 20 and 20 %; lists of 1, 5 and 10 % labels",
            drawn_tiles(_SHARES),
            tiles=True,
            grid=Grid(512, 512, edge="pad"),
            label_shares=SHARES,
        ),
    ),
    gsd_m=0.5,
    color_threshold=128,
    notes="Only the training part has masks; other parts become the split `unlabeled`. Padding of rs-dwl is ignored.",
    citation="Demir et al. 2018, DeepGlobe, arXiv 1805.06561",
)
