"""Grass and cloud of KTDA's authors, and the Landsat 8 scenes that cloud was cut from (L8 Biome)."""

from rsseg.data.index import LabelMap
from rsseg.datasets.card import RGB, DatasetCard, HubSource, Labels, Variant, classes_of
from rsseg.datasets.layouts import Layout
from rsseg.datasets.splits import RATIO, SplitRule, as_found, drawn_by_scene
from rsseg.task import IGNORE_INDEX

_CITATION = (
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
    citation=_CITATION,
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
    citation=f"{_CITATION}; masks: Foga et al. 2017, doi:10.5066/F7251GDH",
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
