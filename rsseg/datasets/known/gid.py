"""GID: land cover in Gaofen-2 scenes, five classes."""

from rsseg.datasets.card import IRRG, RGB, DatasetCard, Variant, color_labels
from rsseg.datasets.layouts import Layout
from rsseg.datasets.prepare.tiles import Grid
from rsseg.datasets.splits import SplitRule, drawn_by_scene, drawn_tiles

GID5 = DatasetCard(
    name="gid5",
    title="land cover, Gaofen-2, 4 m (GID, five classes)",
    size="150 of 7200 px",
    license="terms of the authors (research)",
    labels=(
        color_labels(
            "land",
            "five classes; black is ignored",
            (
                ("built-up", (255, 0, 0)),
                ("farmland", (0, 255, 0)),
                ("forest", (0, 255, 255)),
                ("meadow", (255, 255, 0)),
                ("water", (0, 0, 255)),
            ),
            ignored=[(0, 0, 0)],
        ),
    ),
    variants=(
        Variant(
            Layout("image_NirRGB/{group}.tif", "label_5classes/{group}_label.tif", one_split="train"),
            (*IRRG, "blue"),
        ),
        Variant(Layout("image_RGB/{group}.tif", "label_5classes/{group}_label.tif", one_split="train"), RGB),
    ),
    rules=(
        SplitRule(
            "scene", "60, 20 and 20 % of the scenes, seeded", drawn_by_scene({"train": 0.6, "val": 0.2, "test": 0.2})
        ),
        SplitRule(
            "st-dasegnet",
            "1024-pixel tiles of all scenes shuffled into 70 and 30 %; the remainder of a scene is dropped",
            drawn_tiles({"train": 0.7, "val": 0.3}),
            ("train", "val"),
            tiles=True,
            grid=Grid(1024, 1024, edge="drop"),
            ignore_unknown=True,
        ),
    ),
    gsd_m=4.0,
    notes="Four bands: near infrared, red, green, blue. ST-DASegNet's network saw the first three.",
    citation="Tong et al. 2020, Remote Sensing of Environment 237, arXiv 1807.05713",
)
