"""Landsat 8 cloud masks of the USGS, whole scenes with all bands."""

from rsseg.data.index import LabelMap
from rsseg.datasets.card import DatasetCard, Labels, Variant
from rsseg.datasets.known.ktda import CLOUD
from rsseg.datasets.layouts import Layout
from rsseg.datasets.splits import SplitRule, drawn_by_scene
from rsseg.task import IGNORE_INDEX

BANDS = ("coastal", "blue", "green", "red", "nir", "swir1", "swir2", "pan", "cirrus", "tir1", "tir2")
"""B1 to B11."""
_FILES = {band: number for number, band in enumerate(BANDS, start=1) if band != "pan"}
_MASK = "{domain}/{group}/{group}_fixedmask."
_DOMAINS = {
    "BC": "barren", "FO": "forest", "GC": "grass_crops", "SH": "shrubland", "SI": "snow_ice", "UR": "urban",
    "WA": "water", "WE": "wetlands",
}  # fmt: skip


def _stacked(mask: str) -> Variant:
    return Variant(Layout("{domain}/{group}/{group}.TIF", _MASK + mask, one_split="train", domain_as=_DOMAINS), BANDS)


def _single(mask: str) -> Variant:
    files = "|".join(f"{{domain}}/{{group}}/{{group}}_B{number}.TIF" for number in _FILES.values())
    return Variant(Layout(files, _MASK + mask, one_split="train", domain_as=_DOMAINS), tuple(_FILES))


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
    rules=(
        SplitRule(
            "scene",
            "60, 20 and 20 % of the scenes of each biome",
            drawn_by_scene({"train": 0.6, "val": 0.2, "test": 0.2}),
        ),
    ),
    gsd_m=30.0,
    ignore_zero_collar=True,
    notes="Domains are the eight biomes. Scenes with one file per band are read without B8, which has other pixels. "
    "Not all scenes have shadow masks: a missing shadow may be stored as clear.",
    citation="Foga et al. 2017, doi:10.1016/j.rse.2017.03.026; data doi:10.5066/F7251GDH",
)
