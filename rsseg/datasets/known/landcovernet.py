"""LandCoverNet: Sentinel-2 chips, one label per chip for many dates."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

from rsseg.data.index import IndexItem, LabelMap
from rsseg.datasets.card import RGB, DatasetCard, Labels, Variant, classes_of
from rsseg.datasets.layouts import Layout
from rsseg.datasets.splits import SplitRule, by_scene, drawn_by_scene
from rsseg.errors import DataError
from rsseg.task import IGNORE_INDEX

BANDS = {"red": "B04", "green": "B03", "blue": "B02", "nir": "B08"}


def _files(bands: Sequence[str]) -> Variant:
    images = "|".join(f"{{group}}/{{part}}/S2/{{id}}/{{id}}_{BANDS[band]}_10m.tif" for band in bands)
    tables = "{group}/{part}/S2/{text}.csv"
    return Variant(
        Layout(images, "{group}/{part}/S2/{text}_LC_10m.tif", one_split="train", beside=(tables,)), tuple(bands)
    )


def listed_dates(items: Sequence[IndexItem], files: Mapping[str, Path]) -> Sequence[IndexItem]:
    """The dates that the table beside a chip lists; all of them where there is no table.

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
        # the tables' notes are Chinese; what is looked for is ASCII in either encoding
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
    variants=(_files(tuple(BANDS)), _files(RGB)),
    rules=(
        SplitRule(
            "st-dasegnet",
            "tiles 35JNN, 35JQG, 35KKP train; 35LMC, 35MNT val; others are left out",
            by_scene({"train": ("35JNN", "35JQG", "35KKP"), "val": ("35LMC", "35MNT")}),
            ("train", "val"),
        ),
        SplitRule(
            "scene", "60, 20 and 20 % of the tiles, seeded", drawn_by_scene({"train": 0.6, "val": 0.2, "test": 0.2})
        ),
    ),
    gsd_m=10.0,
    first_mask_band=True,
    keep=listed_dates,
    notes="One image per date; where a chip has a table of dates, only those. 16-bit pixels; --stretch minmax makes "
    "the 8-bit images of ST-DASegNet. The first band of a label file holds the classes.",
    citation="Alemohammad and Booth 2020, LandCoverNet, arXiv 2012.03111",
)
