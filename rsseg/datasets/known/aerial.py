"""Aerial images: Potsdam and Vaihingen of the ISPRS, and CITY-OSM."""

from rsseg.datasets.card import IRRG, RGB, DatasetCard, Labels, Variant, color_labels
from rsseg.datasets.layouts import Layout
from rsseg.datasets.prepare.tiles import Grid
from rsseg.datasets.splits import RATIO, SHARES, SplitRule, by_scene, drawn_by_scene, drawn_tiles
from rsseg.task import Color

CLASSES: tuple[tuple[str, Color], ...] = (
    ("impervious", (255, 255, 255)),
    ("building", (0, 0, 255)),
    ("low vegetation", (0, 255, 255)),
    ("tree", (0, 255, 0)),
    ("car", (255, 255, 0)),
    ("clutter", (255, 0, 0)),
)
CLUTTER = 5
_BORDER = (0, 0, 0)
_LABELS: tuple[Labels, ...] = (
    color_labels("full", "all pixels; black is ignored where it occurs", CLASSES, ignored=[_BORDER]),
    color_labels("no-boundary", "object borders are black and ignored", CLASSES, ignored=[_BORDER]),
)
_ISPRS_TERMS = "ISPRS benchmark terms (research)"
_ISPRS = "ISPRS 2D Semantic Labeling Contest; data: German Society for Photogrammetry (DGPF) and ISPRS WG III/4"

POTSDAM_TRAIN = tuple(
    f"{row}_{col}"
    for rows, cols in (((2, 3, 4, 5), range(10, 13)), ((6, 7), range(7, 13)))
    for row in rows
    for col in cols
)
POTSDAM_TEST = (
    "2_13", "2_14", "3_13", "3_14", "4_13", "4_14", "4_15", "5_13", "5_14", "5_15", "6_13", "6_14", "6_15", "7_13",
)  # fmt: skip
_POTSDAM_VAL = ("2_12", "4_11", "6_9", "7_12")


def _potsdam(code: str, bands: tuple[str, ...], labels: str, suffix: str) -> Variant:
    layout = Layout(
        f"{{any}}top_potsdam_{{group}}_{code}.tif",
        f"{{any}}top_potsdam_{{group}}_{suffix}.tif",
        exclude=("{any}5_Labels_for_participants*/*",),
        one_split="train",
    )
    return Variant(layout, bands, labels)


POTSDAM = DatasetCard(
    name="potsdam",
    title="urban land cover, 5 cm (ISPRS Potsdam)",
    size="38 of 6000 px",
    license=_ISPRS_TERMS,
    labels=_LABELS,
    variants=tuple(
        _potsdam(code, bands, labels, suffix)
        for labels, suffix in (("full", "label"), ("no-boundary", "label_noBoundary"))
        for code, bands in (("RGB", RGB), ("IRRG", IRRG), ("RGBIR", (*RGB, "nir")))
    ),
    rules=(
        SplitRule(
            "isprs",
            "24 training and 14 test images",
            by_scene({"train": POTSDAM_TRAIN, "test": POTSDAM_TEST}),
            ("train", "test"),
        ),
        SplitRule(
            "isprs-val",
            f"isprs with {', '.join(_POTSDAM_VAL)} taken from training as val",
            by_scene(
                {
                    "train": [name for name in POTSDAM_TRAIN if name not in _POTSDAM_VAL],
                    "val": _POTSDAM_VAL,
                    "test": POTSDAM_TEST,
                }
            ),
        ),
        SplitRule(
            "st-dasegnet",
            "512-pixel tiles, the last 368 rows and columns of an image are dropped; val is the ISPRS test part",
            by_scene({"train": POTSDAM_TRAIN, "val": POTSDAM_TEST}),
            ("train", "val"),
            grid=Grid(512, 512, step=512, edge="drop"),
            ignore_unknown=True,
        ),
        SplitRule(
            "rs-dwl",
            "512-pixel tiles of all images shuffled into 60, 20 and 20 %; padding is clutter; lists of 1, 5 and 10 %",
            drawn_tiles({"train": 0.6, "val": 0.2, "test": 0.2}),
            tiles=True,
            grid=Grid(512, 512, edge="pad"),
            pad_label=CLUTTER,
            ignore_unknown=True,
            label_shares=SHARES,
        ),
    ),
    gsd_m=0.05,
    notes="--bands red,green,blue takes 2_Ortho_RGB, nir,red,green 3_Ortho_IRRG, red,green,blue,nir 4_Ortho_RGBIR. "
    "--ignore-class clutter for scores without clutter.",
    citation=_ISPRS,
)

VAIHINGEN_TRAIN = (1, 3, 5, 7, 11, 13, 15, 17, 21, 23, 26, 28, 30, 32, 34, 37)
VAIHINGEN_TEST = (2, 4, 6, 8, 10, 12, 14, 16, 20, 22, 24, 27, 29, 31, 33, 35, 38)
_DASEGNET_VAL = (2, 5, 7, 8, 13, 20, 22, 24)


def _areas(*numbers: int) -> list[str]:
    return [f"area{number}" for number in numbers]


def _vaihingen(labels: str, suffix: str, exclude: tuple[str, ...]) -> Variant:
    layout = Layout(
        "{any}top/top_mosaic_09cm_{group}.tif",
        f"{{any}}top_mosaic_09cm_{{group}}{suffix}.tif",
        # the participants' folder repeats the labels of the training areas
        exclude=("{any}gts_for_participants/*", *exclude),
        one_split="train",
    )
    return Variant(layout, IRRG, labels)


VAIHINGEN = DatasetCard(
    name="vaihingen",
    title="urban land cover, 9 cm (ISPRS Vaihingen)",
    size="33 areas",
    license=_ISPRS_TERMS,
    labels=_LABELS,
    variants=(_vaihingen("full", "", ("{any}*_noBoundary.tif",)), _vaihingen("no-boundary", "_noBoundary", ())),
    rules=(
        SplitRule(
            "isprs",
            "16 training and 17 test areas",
            by_scene({"train": _areas(*VAIHINGEN_TRAIN), "test": _areas(*VAIHINGEN_TEST)}),
            ("train", "test"),
        ),
        SplitRule(
            "isprs-val",
            "isprs with areas 11, 15, 28 and 34 taken from training as val",
            by_scene(
                {
                    "train": _areas(*(set(VAIHINGEN_TRAIN) - {11, 15, 28, 34})),
                    "val": _areas(11, 15, 28, 34),
                    "test": _areas(*VAIHINGEN_TEST),
                }
            ),
        ),
        SplitRule(
            "st-dasegnet",
            "25 and 8 areas in 512-pixel tiles that overlap by half (also in val), the remainder is dropped",
            by_scene(
                {
                    "train": _areas(*({*VAIHINGEN_TRAIN, *VAIHINGEN_TEST} - {*_DASEGNET_VAL})),
                    "val": _areas(*_DASEGNET_VAL),
                }
            ),
            ("train", "val"),
            grid=Grid(512, 256, edge="drop"),
            ignore_unknown=True,
        ),
    ),
    gsd_m=0.09,
    notes="Bands are near infrared, red, green. --ignore-class clutter for scores without clutter.",
    citation=_ISPRS,
)


CITY_OSM = DatasetCard(
    name="city-osm",
    title="roads and buildings, Paris and Chicago (CITY-OSM)",
    size="1,082 images",
    license="images: Google; labels: ODbL",
    labels=(
        color_labels(
            "map",
            "three classes, all pixels",
            (("background", (255, 255, 255)), ("road", (255, 0, 0)), ("building", (0, 0, 255))),
            # the files show roads blue and buildings red
            stored={"road": (0, 0, 255), "building": (255, 0, 0)},
        ),
    ),
    variants=(Variant(Layout("{domain}/{group}_image.png", "{domain}/{group}_labels.png", one_split="train"), RGB),),
    rules=(
        SplitRule("scene", "60, 20 and 20 % of the images of each city, seeded", drawn_by_scene(RATIO)),
        SplitRule(
            "st-dasegnet",
            "512-pixel tiles of all images of a city shuffled into 70 and 30 %; the remainder of an image is dropped",
            drawn_tiles({"train": 0.7, "val": 0.3}, per_domain=True),
            ("train", "val"),
            tiles=True,
            grid=Grid(512, 512, edge="drop"),
            ignore_unknown=True,
            unknown_label=0,
        ),
    ),
    notes="Domains are the folders, such as paris and chicago. st-dasegnet maps unknown colours to background.",
    citation="Kaiser et al. 2017, doi:10.5281/zenodo.1154821",
)
