"""What the accuracy table compares: settings (a dataset and its labels), arms (a method and its network), profiles.

An arm is a recipe of `recipes/`, a setting says which images it gets, a profile how long it trains on which crops. All
arms of a setting train equally long on equal crops.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

RECIPES = Path(__file__).parent / "recipes"


@dataclass(frozen=True)
class Arm:
    """One line of a table.

    name     of its recipe in `recipes/`
    plain    arm that it is compared with: plain supervised training of the same network
    needs    pairs of a recipe key and an arm, whose model of the same setting and seed is the key's value
    long     plain arm that trains as many steps as this one and its `start` model together
    lengths  training length as a multiple of the profile's steps
    rate_of  arm whose sweep chooses the learning rate; None: its own
    switch   True: one setting of a recipe that is tried on top of another arm; run after all others
    """

    name: str
    plain: str | None = None
    needs: tuple[tuple[str, str], ...] = ()
    long: str | None = None
    lengths: int = 1
    rate_of: str | None = None
    switch: bool = False

    @property
    def recipe(self) -> Path:
        return RECIPES / f"{self.name}.yaml"


@dataclass(frozen=True)
class Setting:
    """One table.

    dataset  see `data.py`
    streams  per stream name a selection; an arm takes those that its method asks for. `items` names a list that
             `data.py` writes into the dataset's folder
    rates    setting whose learning-rate sweep is used; None: its own
    bands    of the dataset; None: all
    """

    name: str
    title: str
    dataset: str
    arms: tuple[Arm, ...]
    streams: Mapping[str, Mapping[str, Any]]
    val: Mapping[str, Any] = field(default_factory=lambda: {"split": "val"})
    test: Mapping[str, Any] = field(default_factory=lambda: {"split": "test"})
    rates: str | None = None
    bands: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Profile:
    """How cells are run.

    half         images of Dubai at half resolution
    crop         side of the training crops in pixels
    steps        of a cell; `sweep_steps` of a run that chooses a rate
    rates        factors on the recipe's learning rate that the sweep tries
    device       `auto` takes a GPU
    """

    name: str
    settings: tuple[str, ...]
    steps: int
    sweep_steps: int
    crop: int = 126
    batch_size: int = 8
    seeds: tuple[int, ...] = (0, 1, 2)
    rates: tuple[float, ...] = (0.3, 1.0, 3.0)
    evaluations: int = 4
    half: bool = True
    device: str = "cpu"
    workers: int = 0


LITE0 = (Arm("lite0-plain"), Arm("lite0-ktda", "lite0-plain"))
DINO = (Arm("dinov2s-full"), Arm("dinov2s-frozen", "dinov2s-full"), Arm("dinov2s-lora", "dinov2s-full"))
SEMI = (Arm("dinov2s-fixmatch", "dinov2s-full"), Arm("dinov2s-mtdf", "dinov2s-full"))
TAUGHT_BY = (("task_teacher.model", "dinov2s-full"),)
TAUGHT = (Arm("lite0-ktda-side", "lite0-plain"), Arm("lite0-taught", "lite0-plain", TAUGHT_BY))


def _started(name: str, plain: str, *, start: str | None = None, varies: str | None = None) -> Arm:
    """An arm that starts from its plain arm, or another; `varies`: the arm that it changes one setting of."""
    start = (("start", start or plain),)
    return Arm(name, plain, start, long=f"{plain}-long", rate_of=varies, switch=varies is not None)


RECOMMENDED = (
    Arm("lite0-ktda-recommended", "lite0-plain", TAUGHT_BY),
    _started("lite0-mtdf-recommended", "lite0-plain"),
    Arm("lite0-plain-long", "lite0-plain", lengths=2, rate_of="lite0-plain"),
)
FIRST = (*LITE0, *DINO, *RECOMMENDED)
DINO_RECOMMENDED = (
    _started("dinov2s-mtdf-recommended", "dinov2s-full"),
    Arm("dinov2s-full-long", "dinov2s-full", lengths=2, rate_of="dinov2s-full"),
)
AVERAGED = (
    Arm("lite0-mtdf-no-start", "lite0-plain", switch=True),
    Arm("lite0-average", "lite0-plain", rate_of="lite0-plain", switch=True),
    Arm("lite0-ktda-average", "lite0-plain", rate_of="lite0-ktda-side", switch=True),
)
"""The moving average with pseudo-labels, alone, and with feature distillation: tells the gain of each."""
MODE_SWITCHES = (
    Arm("lite0-ktda-cutmix", "lite0-plain", TAUGHT_BY, rate_of="lite0-ktda-recommended", switch=True),
    _started("lite0-mtdf-one-threshold", "lite0-plain", varies="lite0-mtdf-recommended"),
    _started("lite0-mtdf-no-ramp", "lite0-plain", varies="lite0-mtdf-recommended"),
    _started("lite0-mtdf-equal-weights", "lite0-plain", varies="lite0-mtdf-recommended"),
    _started("lite0-mtdf-two-views", "lite0-plain", varies="lite0-mtdf-recommended"),
    _started("dinov2s-mtdf-complementary-dropout", "dinov2s-full", varies="dinov2s-mtdf-recommended"),
    Arm("dinov2s-layer-decay", "dinov2s-full", rate_of="dinov2s-full", switch=True),
    Arm("dinov2s-one-rate", "dinov2s-full", rate_of="dinov2s-full", switch=True),
    *AVERAGED,
)
SWITCHES = tuple(
    Arm(f"lite0-{switch}", "lite0-plain", rate_of="lite0-plain", switch=True)
    for switch in ("dice", "focal", "rare", "light", "strong")
)
TARGET = (
    Arm("lite0-source"),
    Arm("lite0-target-statistics", "lite0-source"),
    Arm("lite0-dasegnet", "lite0-source"),
    _started("lite0-dasegnet-recommended", "lite0-source"),
    Arm("lite0-source-long", "lite0-source", lengths=2, rate_of="lite0-source"),
    Arm("lite0-dasegnet-no-start", "lite0-source", switch=True),
    _started("lite0-dasegnet-average", "lite0-source", varies="lite0-dasegnet-recommended"),
    _started("lite0-dasegnet-no-mix", "lite0-source", varies="lite0-dasegnet-recommended"),
    _started("lite0-dasegnet-same-view", "lite0-source", varies="lite0-dasegnet-recommended"),
    _started("lite0-dasegnet-eval-teacher", "lite0-source", varies="lite0-dasegnet-recommended"),
    _started("lite0-dasegnet-masked", "lite0-source", varies="lite0-dasegnet-recommended"),
    _started("lite0-dasegnet-target-statistics", "lite0-source", varies="lite0-dasegnet-recommended"),
    Arm("dinov2s-source"),
    _started("dinov2s-dasegnet", "dinov2s-source"),
)
WEIGHTED = (
    Arm("lite0-class-weights", "lite0-plain", rate_of="lite0-plain", switch=True),
    Arm("lite0-ktda-weights", "lite0-plain", rate_of="lite0-ktda-side", switch=True),
    _started("lite0-mtdf-weights", "lite0-plain", start="lite0-class-weights", varies="lite0-mtdf-recommended"),
)
"""Class weights were the best single switch by validation."""
TARGET_WEIGHTED = (
    Arm("lite0-source-weights", "lite0-source", rate_of="lite0-source", switch=True),
    _started(
        "lite0-dasegnet-weights", "lite0-source", start="lite0-source-weights", varies="lite0-dasegnet-recommended"
    ),
)
MINI = (Arm("mini-plain"), Arm("mini-ktda", "mini-plain"), Arm("mini-fixmatch", "mini-plain"))


ALL = 45
"""Training images of Dubai. Where all are labeled, the same ones are the images without labels."""


def _dubai(labeled: int, arms: tuple[Arm, ...], *, rates: str | None = "dubai-10") -> Setting:
    items = {"split": "train", "items": f"labeled-{labeled}.txt"}
    rest = {"split": "train"} if labeled == ALL else items | {"complement": True}
    return Setting(
        name=f"dubai-{labeled}",
        title=f"Dubai land cover, {labeled} labeled images",
        dataset="dubai",
        arms=arms,
        streams={"labeled": items, "unlabeled": rest},
        rates=rates,
    )


SETTINGS = {
    setting.name: setting
    for setting in (
        _dubai(
            10,
            (*LITE0, *DINO, *RECOMMENDED, *SEMI, *TAUGHT, *DINO_RECOMMENDED, *WEIGHTED, *SWITCHES, *MODE_SWITCHES),
            rates=None,
        ),
        _dubai(45, (*FIRST, *TAUGHT, *WEIGHTED, *AVERAGED)),
        Setting(
            name="l8biome-rgb",
            title="Landsat 8 clouds, 16 labeled patches, red, green, blue",
            dataset="l8biome",
            arms=(*FIRST, *TAUGHT, *WEIGHTED, *AVERAGED),
            streams={"labeled": {"split": "train"}, "unlabeled": {"split": "train"}},
            bands=("red", "green", "blue"),
        ),
        Setting(
            name="l8biome-8",
            title="Landsat 8 clouds, 16 labeled patches, eight bands",
            dataset="l8biome",
            arms=(Arm("lite0-plain"), *AVERAGED[:2]),
            streams={"labeled": {"split": "train"}, "unlabeled": {"split": "train"}},
            rates="l8biome-rgb",
        ),
        _dubai(20, (*LITE0, *DINO, *SEMI, *TAUGHT, *WEIGHTED, *AVERAGED)),
        _dubai(5, (*LITE0, *DINO, *SEMI, Arm("lite0-ktda-side", "lite0-plain"), *AVERAGED)),
        Setting(
            name="dubai-desert-town",
            title="Dubai, labels of desert and coast, test in the town",
            dataset="dubai-uda",
            arms=(*TARGET, *TARGET_WEIGHTED),
            streams={
                "labeled": {"split": "train", "domain": "desert"},
                "unlabeled": {"split": "unlabeled", "domain": "town"},
                "source": {"split": "train", "domain": "desert"},
                "target": {"split": "unlabeled", "domain": "town"},
            },
            val={"split": "val", "domain": "desert"},
            test={"split": "test", "domain": "town"},
        ),
        Setting(
            name="l8biome-natural-infrared",
            title="Landsat 8 clouds, labels in natural colors, test in infrared bands",
            dataset="l8biome-uda",
            arms=(*TARGET, *TARGET_WEIGHTED),
            streams={
                "labeled": {"split": "train", "domain": "natural"},
                "unlabeled": {"split": "unlabeled", "domain": "infrared"},
                "source": {"split": "train", "domain": "natural"},
                "target": {"split": "unlabeled", "domain": "infrared"},
            },
            val={"split": "val", "domain": "natural"},
            test={"split": "test", "domain": "infrared"},
        ),
        Setting(
            name="demo-4",
            title="The built-in dataset, 4 labeled images, networks from scratch",
            dataset="demo",
            arms=MINI,
            streams={
                "labeled": {"split": "train", "domain": "north", "count": 4},
                "unlabeled": {"split": "unlabeled", "domain": "north"},
            },
            val={"split": "val", "domain": "north"},
            test={"split": "test", "domain": "north"},
        ),
    )
}

NEEDED = {name for setting in SETTINGS.values() for arm in setting.arms for _, name in arm.needs}
"""Arms whose models are kept, for others to learn from."""

PROFILES = {
    profile.name: profile
    for profile in (
        Profile(
            name="quick",
            settings=("demo-4",),
            steps=8,
            sweep_steps=4,
            crop=64,
            batch_size=4,
            seeds=(0,),
            rates=(1.0, 3.0),
            evaluations=2,
        ),
        Profile(
            name="cpu",
            settings=(
                "dubai-10",
                "l8biome-rgb",
                "dubai-45",
                "dubai-desert-town",
                "l8biome-natural-infrared",
                "demo-4",
                "dubai-20",
                "dubai-5",
                "l8biome-8",
            ),
            steps=400,
            sweep_steps=120,
        ),
        Profile(
            name="gpu",
            settings=tuple(SETTINGS),
            steps=1500,
            sweep_steps=300,
            crop=252,
            seeds=(0, 1, 2, 3, 4),
            half=False,
            device="auto",
            workers=1,
        ),
    )
}
