"""The two datasets of KTDA's authors: grass and cloud."""

from rsseg.data.index import LabelMap
from rsseg.datasets.card import RGB, DatasetCard, HubSource, Labels, Variant, classes_of
from rsseg.datasets.layouts import Layout
from rsseg.datasets.splits import SplitRule, as_found
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
    rules=(SplitRule("shipped", "as the archive has it", as_found, ("train", "val")),),
    notes="No test split: published figures are of val, which also chose the weights. "
    "Pixels that nobody labeled are stored as low.",
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
    rules=(SplitRule("shipped", "as the archive has it", as_found),),
    gsd_m=30.0,
    notes="Choose weights on val; the published figures chose them on test.",
    citation=f"{_CITATION}; masks: Foga et al. 2017, doi:10.5066/F7251GDH",
    hub=HubSource(_HUB, "cloud.zip"),
)
