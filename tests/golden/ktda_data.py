"""KTDA's golden cases outside the networks: distortion, preprocessing, learning rates, scores."""

import numpy as np
import torch

from rsseg.config import OptimizerConfig, ScheduleConfig
from rsseg.data.assembly import Crop, collate
from rsseg.data.augmentation import PhotometricDraws, photometric_distortion
from rsseg.data.streams import Scaling, to_samples
from rsseg.metrics import ConfusionMatrix, scores
from rsseg.recipe import load_recipe
from rsseg.training.step import lr_at
from tests.golden.builders import make_task, mmseg_scores
from tests.golden.case import Case
from tests.golden.harness import Drivers
from tests.golden.settings import Settings, plain

MEAN = (123.675, 116.28, 103.53)
STD = (58.395, 57.12, 57.375)


def scripted_draws(integers: list[int], uniforms: list[float]) -> PhotometricDraws:
    """Replay a recorded sequence in the order of the published code."""
    integer, uniform = iter(integers), iter(uniforms)
    brightness = next(uniform) if next(integer) else None
    contrast_first = next(integer) == 1
    contrast = next(uniform) if contrast_first and next(integer) else None
    saturation = next(uniform) if next(integer) else None
    hue = next(integer) if next(integer) else None
    if not contrast_first:
        contrast = next(uniform) if next(integer) else None
    assert next(integer, None) is None, f"integers are left of {integers}"
    assert next(uniform, None) is None, f"numbers are left of {uniforms}"
    return PhotometricDraws(brightness, contrast, contrast_first, saturation, hue)


def photometric(case: Case) -> None:
    image = case.tensors["in.bgr_hwc"].flip(-1).contiguous().numpy()
    for number, chain in enumerate(case.meta["chains"]):
        draws = scripted_draws(chain["randint_sequence"], chain["uniform_sequence"])
        actual = torch.from_numpy(photometric_distortion(image, draws).copy())
        case.close(f"chain {number}, {draws}", actual, case.tensors[f"out.{number}"].flip(-1), rtol=0.0, atol=0.0)


def preprocessor(case: Case) -> None:
    """Normalized images of any height and width, padded right and bottom to the case's size."""
    hyper = case.meta["hyper"]
    for key, value in (("bgr_to_rgb", True), ("rgb_to_bgr", False), ("pad_val", 0), ("seg_pad_val", 255)):
        hyper.expect(key, value)
    hyper.expect("type", "SegDataPreProcessor")
    mean, std = (torch.tensor(plain(hyper.get(k, d)))[:, None, None] / 255 for k, d in (("mean", MEAN), ("std", STD)))
    images = case.sequence("in.bgr_uint8")
    crops = [
        Crop(
            image=image.flip(0).permute(1, 2, 0).numpy(),
            valid=np.ones(image.shape[1:], np.bool_),
            mask=case.tensors[f"in.label.{i}"][0].to(torch.uint8).numpy(),
        )
        for i, image in enumerate(images)
    ]
    height, width = padded_size(case, hyper, [tuple(image.shape[1:]) for image in images])
    task = make_task(2).model_copy(update={"scale": (1 / 255,) * 3})
    scaling = Scaling.of(task, mean.flatten().tolist(), torch.device("cpu"))
    # our crops are squares; what lies right of and below the case's size is padding
    samples = to_samples(collate(crops, max(height, width)), scaling)
    case.check(((samples.images - mean) / std)[..., :height, :width], "out.batch")
    assert samples.masks is not None
    case.close("out.label", samples.masks[:, None, :height, :width], case.tensors["out.label"], rtol=0.0, atol=0.0)


def padded_size(case: Case, hyper: Settings, sizes: list[tuple[int, int]]) -> tuple[int, int]:
    """Size of the batch: in training the stated one or the largest image's, rounded up; else that of the images."""
    height, width = (max(sides) for sides in zip(*sizes, strict=True))
    if case.detail != "training":
        assert case.detail in ("test", "testing", "inference", "validation"), f"{case.name}: unknown {case.detail!r}"
        assert len(set(sizes)) == 1
        return height, width
    if hyper.get("size") is not None:
        size = plain(hyper["size"])
        return tuple(size) if isinstance(size, list) else (size, size)  # type: ignore[return-value]
    divisor = hyper["size_divisor"]
    return -(-height // divisor) * divisor, -(-width // divisor) * divisor


def optimizer_of(case: Case) -> OptimizerConfig:
    """From the case's own schedulers, else of the packaged recipe that the case is named after."""
    settings = next((part for part in (case.meta, case.meta.get("hyper", {})) if "param_scheduler" in part), None)
    if settings is None:
        recipe = load_recipe(case.name.removeprefix("lr_schedule_").partition("_")[0])
        assert recipe.trainer.steps == case.meta["iterations"]
        return recipe.optimizers["main"]  # type: ignore[no-any-return]
    by_type = {part["type"]: part for part in settings["param_scheduler"]}
    assert set(by_type) <= {"LinearLR", "PolyLR"}, f"{case.name}: unknown schedulers {sorted(by_type)}"
    warmup, poly = (by_type.get(name, Settings({})) for name in ("LinearLR", "PolyLR"))
    warmup.expect("begin", 0)
    warmup.expect("end_factor", 1, 1.0)
    poly.expect("end", case.meta["iterations"])
    for part in by_type.values():
        part.expect("by_epoch", False)
    schedule = ScheduleConfig(
        warmup_steps=warmup.get("end", 0),
        warmup_start=warmup.get("start_factor", 1.0),
        decay="poly" if poly else "constant",
        power=poly.get("power", 1.0),
        decay_begin=poly.get("begin", 0),
        min_lr=poly.get("eta_min", 0.0),
    )
    for part in by_type.values():
        assert not part.unread(), f"{case.name}: unknown settings {part.unread()}"
    return OptimizerConfig(lr=settings["lr"], schedule=schedule)


def check_schedule(case: Case) -> None:
    optimizer, total = optimizer_of(case), int(case.meta["iterations"])
    rates = [lr_at(optimizer.schedule, optimizer.lr, step, total) for step in range(total)]
    case.check(torch.tensor(rates, dtype=torch.float64)[case.tensors["in.iteration"]], "out.lr")
    if "peak" in case.meta:
        peak = case.meta["peak"]
        case.close("highest rate", max(rates), peak["lr"])
        case.close("rate at the peak", rates[peak["iteration"]], peak["lr"])


def check_scores(case: Case) -> None:
    num_classes = int(case.meta["num_classes"])
    confusion = ConfusionMatrix(num_classes)
    confusion.update(case.tensors["in.pred"], case.tensors["in.label"])
    per_class, means = mmseg_scores(scores(confusion.counts[:-1], [str(i) for i in range(num_classes)]))
    for name, expected in case.meta["per_class"].items():
        actual = per_class[name]
        assert [v is None for v in actual] == [v is None for v in expected], f"{case.name} {name}"
        case.close(name, [v for v in actual if v is not None], [v for v in expected if v is not None], atol=1e-6)
    for name, expected in case.meta["summary_percent"].items():
        # the recorded summary is in percent, rounded to two decimals
        case.close(name, 100 * means[name], expected, atol=0.0051)


DRIVERS: Drivers = {
    "PhotoMetricDistortion with scripted random draws": photometric,
    "SegDataPreProcessor": preprocessor,
    "mmengine LinearLR + PolyLR as configured": check_schedule,
    "mmseg IoUMetric": check_scores,
}
