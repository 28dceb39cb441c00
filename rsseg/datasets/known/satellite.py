"""Satellite images: grass and cloud of KTDA's authors, L8 Biome, LoveDA, DeepGlobe, GID, LandCoverNet."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

from rsseg.data.index import IndexItem, LabelMap
from rsseg.datasets.card import IRRG, RGB, DatasetCard, HubSource, Labels, Variant, WebSource, classes_of, color_labels
from rsseg.datasets.layouts import Layout
from rsseg.datasets.prepare.tiles import Grid
from rsseg.datasets.splits import RATIO, SHARES, SplitRule, as_found, by_scene, drawn_by_scene, drawn_tiles, halved_val
from rsseg.errors import DataError
from rsseg.task import IGNORE_INDEX, Color

_KTDA = (
    "Knowledge Transfer and Domain Adaptation for Fine-Grained Remote Sensing Image Segmentation "
    "(KTDA); archives of the authors"
)
_HUB = "XavierJiezou/ktda-datasets"

GRASS = DatasetCard(
    name="grass",
    title="grassland cover in five levels",
    size="180 MB",
    license="cc-by-nc-4.0",
    labels=(
        Labels(
            "levels",
            "five levels of cover",
            classes_of(
                ("low", (185, 101, 71)),
                ("middle-low", (248, 202, 155)),
                ("middle", (211, 232, 158)),
                ("middle-high", (138, 191, 104)),
                ("high", (92, 144, 77)),
            ),
            LabelMap(values={**{i: i for i in range(5)}, 255: IGNORE_INDEX}),
        ),
    ),
    variants=(Variant(Layout("img_dir/{split}/*.tif", "ann_dir/{split}/*.png"), RGB),),
    rules=(SplitRule("shipped", "as in the archive", as_found, ("train", "val")),),
    notes="No test split: published figures are on val, which also selected the weights. "
    "Unlabeled pixels are stored as low.",
    citation=_KTDA,
    hub=HubSource(_HUB, "grass.zip"),
)

CLOUD = DatasetCard(
    name="cloud",
    title="clouds and shadows in Landsat 8 (L8 Biome, RGB)",
    size="2.8 GB",
    license="cc-by-nc-4.0",
    labels=(
        Labels(
            "clouds",
            "four classes",
            classes_of(
                ("Clear", (79, 253, 199)),
                ("Cloud Shadow", (221, 53, 223)),
                ("Thin Cloud", (251, 255, 41)),
                ("Cloud", (77, 2, 115)),
            ),
            LabelMap(values={i: i for i in range(4)}),
        ),
    ),
    variants=(Variant(Layout("img_dir/{split}/*.png", "ann_dir/{split}/*.png"), RGB),),
    rules=(SplitRule("shipped", "as in the archive", as_found),),
    gsd_m=30.0,
    notes="Select weights on val; the published figures selected them on test.",
    citation=f"{_KTDA}; masks: Foga et al. 2017, doi:10.5066/F7251GDH",
    hub=HubSource(_HUB, "cloud.zip"),
)

LANDSAT8_BANDS = ("coastal", "blue", "green", "red", "nir", "swir1", "swir2", "pan", "cirrus", "tir1", "tir2")
"""B1 to B11."""
_BAND_FILES = {band: number for number, band in enumerate(LANDSAT8_BANDS, start=1) if band != "pan"}
_MASK = "{domain}/{group}/{group}_fixedmask."
_BIOMES = {
    "BC": "barren", "FO": "forest", "GC": "grass_crops", "SH": "shrubland", "SI": "snow_ice", "UR": "urban",
    "WA": "water", "WE": "wetlands",
}  # fmt: skip


def _stacked(mask: str) -> Variant:
    return Variant(
        Layout("{domain}/{group}/{group}.TIF", _MASK + mask, one_split="train", domain_as=_BIOMES), LANDSAT8_BANDS
    )


def _single(mask: str) -> Variant:
    files = "|".join(f"{{domain}}/{{group}}/{{group}}_B{number}.TIF" for number in _BAND_FILES.values())
    return Variant(Layout(files, _MASK + mask, one_split="train", domain_as=_BIOMES), tuple(_BAND_FILES))


L8BIOME = DatasetCard(
    name="l8biome",
    title="clouds and shadows in Landsat 8 (L8 Biome, scenes)",
    size="96 scenes",
    license="public domain (USGS)",
    labels=(
        Labels(
            "clouds",
            "four classes; fill is ignored",
            CLOUD.classes,
            LabelMap(values={0: IGNORE_INDEX, 128: 0, 64: 1, 192: 2, 255: 3}),
        ),
    ),
    variants=(_stacked("TIF"), _stacked("img"), _single("TIF"), _single("img")),
    rules=(SplitRule("scene", "60, 20 and 20 % of the scenes of each biome", drawn_by_scene(RATIO)),),
    gsd_m=30.0,
    ignore_zero_collar=True,
    notes="Domains are the eight biomes. Scenes with one file per band are read without B8, which has other pixels. "
    "Not all scenes have shadow masks: a missing shadow may be stored as clear.",
    citation="Foga et al. 2017, doi:10.1016/j.rse.2017.03.026; data doi:10.5066/F7251GDH",
)


_RECORD = "https://zenodo.org/records/5706578/files"

LOVEDA = DatasetCard(
    name="loveda",
    title="land cover, rural and urban (LoveDA)",
    size="5,987 of 1024 px",
    license="cc-by-nc-sa-4.0",
    labels=(
        Labels(
            "land",
            "seven classes; no-data is ignored",
            classes_of(
                ("background", (255, 255, 255)),
                ("building", (255, 0, 0)),
                ("road", (255, 255, 0)),
                ("water", (0, 0, 255)),
                ("barren", (159, 129, 183)),
                ("forest", (0, 255, 0)),
                ("agricultural", (255, 195, 128)),
            ),
            LabelMap(values={0: IGNORE_INDEX, **{value: value - 1 for value in range(1, 8)}}),
        ),
    ),
    variants=(
        Variant(
            Layout(
                "{split}/{domain}/images_png/*.png",
                "{split}/{domain}/masks_png/*.png",
                unlabeled=("test",),
                split_as={"Train": "train", "Val": "val", "Test": "test"},
                domain_as={"Rural": "rural", "Urban": "urban"},
            ),
            RGB,
        ),
    ),
    rules=(
        SplitRule("official", "as shipped; the masks of test are not public", as_found),
        SplitRule(
            "rs-dwl",
            "512-pixel quarters; official val halved into val and test at random; lists of 1, 5 and 10 % labels",
            halved_val,
            tiles=True,
            grid=Grid(512, 512, edge="pad"),
            label_shares=SHARES,
        ),
    ),
    gsd_m=0.3,
    notes="Domains rural and urban. Masks store no-data as 0, so class values begin at 1.",
    citation="Wang et al. 2021, LoveDA, arXiv 2110.08733",
    web=(
        WebSource(f"{_RECORD}/Train.zip", "Train.zip", "de2b196043ed9b4af1690b3f9a7d558f"),
        WebSource(f"{_RECORD}/Val.zip", "Val.zip", "84cae2577468ff0b5386758bb386d31d"),
        WebSource(f"{_RECORD}/Test.zip", "Test.zip", "a489be0090465e01fb067795d24e6b47"),
    ),
)

_DEEPGLOBE_CLASSES: tuple[tuple[str, Color], ...] = (
    ("urban", (0, 255, 255)),
    ("agriculture", (255, 255, 0)),
    ("rangeland", (255, 0, 255)),
    ("forest", (0, 255, 0)),
    ("water", (0, 0, 255)),
    ("barren", (255, 255, 255)),
)
_UNKNOWN: tuple[str, Color] = ("unknown", (0, 0, 0))
_DEEPGLOBE_FOLDERS = {
    **dict.fromkeys(("train", "land-train", "land_train"), "train"),
    **dict.fromkeys(("valid", "test", "land-valid", "land-test", "land_valid", "land_test"), "unlabeled"),
}

DEEPGLOBE = DatasetCard(
    name="deepglobe",
    title="land cover, 50 cm (DeepGlobe)",
    size="803 of 2448 px",
    license="DeepGlobe 2018 terms (research)",
    labels=(
        color_labels("land", "six classes; unknown is ignored", _DEEPGLOBE_CLASSES, ignored=[_UNKNOWN[1]]),
        color_labels("with-unknown", "unknown is a class, as in RS-MTDF", [*_DEEPGLOBE_CLASSES, _UNKNOWN]),
    ),
    variants=tuple(
        Variant(layout, RGB, labels)
        for labels in ("land", "with-unknown")
        for layout in (
            Layout("images/*_sat.jpg", "masks/*_mask.png", one_split="train"),
            Layout("images/*.jpg", "masks/*.png", one_split="train"),
            Layout("images/*.png", "masks/*.png", one_split="train"),
            Layout("{split}/*_sat.jpg", "{split}/*_mask.png", unlabeled=("unlabeled",), split_as=_DEEPGLOBE_FOLDERS),
            Layout("*_sat.jpg", "*_mask.png", one_split="train"),
        )
    ),
    rules=(
        SplitRule("scene", "60, 20 and 20 % of the labeled images, seeded", drawn_by_scene(RATIO)),
        SplitRule(
            "rs-dwl",
            "512-pixel tiles of all labeled images shuffled into 60, 20 and 20 %; lists of 1, 5 and 10 % labels",
            drawn_tiles(RATIO),
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
            Layout("image_NirRGB/{group}.tif", "label_5classes/{group}_label.tif", one_split="train"), (*IRRG, "blue")
        ),
        Variant(Layout("image_RGB/{group}.tif", "label_5classes/{group}_label.tif", one_split="train"), RGB),
    ),
    rules=(
        SplitRule("scene", "60, 20 and 20 % of the scenes, seeded", drawn_by_scene(RATIO)),
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
    notes="Four bands: near infrared, red, green, blue. ST-DASegNet uses the first three.",
    citation="Tong et al. 2020, Remote Sensing of Environment 237, arXiv 1807.05713",
)


_SENTINEL2_BANDS = {"red": "B04", "green": "B03", "blue": "B02", "nir": "B08"}


def _files(bands: Sequence[str]) -> Variant:
    images = "|".join(f"{{group}}/{{part}}/S2/{{id}}/{{id}}_{_SENTINEL2_BANDS[band]}_10m.tif" for band in bands)
    tables = "{group}/{part}/S2/{text}.csv"
    return Variant(
        Layout(images, "{group}/{part}/S2/{text}_LC_10m.tif", one_split="train", beside=(tables,)), tuple(bands)
    )


def listed_dates(items: Sequence[IndexItem], files: Mapping[str, Path]) -> Sequence[IndexItem]:
    """Images of the dates in the table beside a chip; all dates if there is no table.

    Raises `DataError` for a table that cannot be read.
    """
    tables = {name.rpartition("/")[0]: path for name, path in files.items() if name.endswith(".csv")}
    dates = {folder: _dates(path) for folder, path in tables.items()}
    kept = []
    for item in items:
        date_folder = item.image.split("|")[0].rpartition("/")[0]
        chip, _, name = date_folder.rpartition("/")
        if chip not in dates or name[-8:] in dates[chip]:
            kept.append(item)
    return kept


def _dates(path: Path) -> set[str]:
    """Second column of the rows that are numbered in the first."""
    try:
        # Notes in the tables are Chinese, in one of two encodings; the dates are ASCII in both.
        with path.open(encoding="utf-8", errors="replace", newline="") as file:
            return {row[1].strip() for row in csv.reader(file) if len(row) > 1 and row[0].strip()}
    except (OSError, csv.Error) as error:
        raise DataError(f"{path}: the table of dates cannot be read ({error}).") from None


LANDCOVERNET_S2 = DatasetCard(
    name="landcovernet-s2",
    title="land cover, Sentinel-2, 10 m (LandCoverNet)",
    size="chips of 256 px",
    license="cc-by-4.0",
    labels=(
        Labels(
            "land",
            "seven classes; 0 is ignored",
            classes_of(
                ("water", (0, 0, 255)),
                ("artificial bare ground", (136, 136, 136)),
                ("natural bare ground", (209, 164, 109)),
                ("snow and ice", (245, 245, 255)),
                ("woody", (214, 76, 43)),
                ("cultivated", (24, 104, 24)),
                ("semi-natural", (0, 255, 0)),
            ),
            LabelMap(values={0: IGNORE_INDEX, **{value: value - 1 for value in range(1, 8)}}),
        ),
    ),
    variants=(_files(tuple(_SENTINEL2_BANDS)), _files(RGB)),
    rules=(
        SplitRule(
            "st-dasegnet",
            "tiles 35JNN, 35JQG, 35KKP train; 35LMC, 35MNT val; others are left out",
            by_scene({"train": ("35JNN", "35JQG", "35KKP"), "val": ("35LMC", "35MNT")}),
            ("train", "val"),
        ),
        SplitRule("scene", "60, 20 and 20 % of the tiles, seeded", drawn_by_scene(RATIO)),
    ),
    gsd_m=10.0,
    first_mask_band=True,
    keep=listed_dates,
    notes="One image per date; where a chip has a table of dates, only those. 16-bit pixels; --stretch minmax makes "
    "the 8-bit images of ST-DASegNet. The first band of a label file holds the classes.",
    citation="Alemohammad and Booth 2020, LandCoverNet, arXiv 2012.03111",
)
