"""LoveDA: rural and urban land cover."""

from rsseg.data.index import LabelMap
from rsseg.datasets.card import RGB, DatasetCard, Labels, Variant, WebSource, classes_of
from rsseg.datasets.layouts import Layout
from rsseg.datasets.prepare.tiles import Grid
from rsseg.datasets.splits import SHARES, SplitRule, as_found, halved_val
from rsseg.task import IGNORE_INDEX

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
