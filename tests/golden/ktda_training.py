"""Handlers of golden cases: the learning-rate schedule and the scores of evaluation."""

import pytest
import torch

from rsseg.config import OptimizerConfig, ScheduleConfig
from rsseg.metrics import ConfusionMatrix, scores
from rsseg.recipe import load_recipe
from rsseg.training.optimizers import lr_at
from tests.golden.harness import Case, Handler


def optimizer_of(case: Case) -> OptimizerConfig:
    """From the case's own schedulers, else of the packaged recipe that the case is named after."""
    hyper = case.meta | case.meta.get("hyper", {})
    if "param_scheduler" not in hyper:
        return load_recipe(case.name.removeprefix("lr_schedule_").partition("_")[0]).optimizers["main"]
    by_type = {part["type"]: part for part in hyper["param_scheduler"]}
    warmup, poly = by_type.get("LinearLR", {}), by_type.get("PolyLR", {})
    schedule = ScheduleConfig(
        warmup_steps=warmup.get("end", 0),
        warmup_start=warmup.get("start_factor", 1.0),
        decay="poly" if poly else "constant",
        power=poly.get("power", 1.0),
        decay_begin=poly.get("begin", 0),
        min_lr=poly.get("eta_min", 0.0),
    )
    return OptimizerConfig(lr=hyper["lr"], schedule=schedule)


def check_schedule(case: Case) -> None:
    optimizer, total = optimizer_of(case), int(case.meta["iterations"])
    rates = [lr_at(optimizer.schedule, optimizer.lr, step, total) for step in range(total)]
    case.check(torch.tensor(rates, dtype=torch.float64)[case.tensors["in.iteration"]], "out.lr")
    if peak := case.meta.get("peak"):
        highest = max(range(total), key=rates.__getitem__)
        assert rates[highest] == pytest.approx(peak["lr"], rel=1e-6)
        assert rates[peak["iteration"]] == pytest.approx(peak["lr"], rel=1e-6)


def check_scores(case: Case) -> None:
    num_classes = int(case.meta["num_classes"])
    confusion = ConfusionMatrix(num_classes)
    confusion.update(case.tensors["in.pred"], case.tensors["in.label"])
    result = scores(confusion.matrix, [str(i) for i in range(num_classes)])

    f1_skipped = [c.f1 if c.precision is not None and c.recall is not None and c.f1 else None for c in result.classes]
    for name, actual in {
        "aAcc": [result.oa],
        "IoU": [c.iou for c in result.classes],
        "Acc": [c.recall for c in result.classes],
        "Dice": [c.f1 for c in result.classes],
        "Fscore": f1_skipped,
        "Precision": [c.precision for c in result.classes],
        "Recall": [c.recall for c in result.classes],
    }.items():
        expected = case.meta["per_class"][name]
        assert [v is None for v in actual] == [v is None for v in expected], f"{case.name} {name}"
        torch.testing.assert_close(
            [v for v in actual if v is not None], [v for v in expected if v is not None], rtol=0.0, atol=1e-6
        )
    for name, mean in {
        "aAcc": result.oa,
        "mIoU": result.miou,
        "mAcc": result.macc,
        "mDice": result.mf1,
        "mFscore": result.variants["mf1_nan_skipped"],
        "mPrecision": result.mprecision,
        "mRecall": result.macc,
    }.items():
        assert mean is not None
        # The recorded summary is in percent, rounded to two decimals.
        torch.testing.assert_close(100 * mean, case.meta["summary_percent"][name], rtol=0.0, atol=0.0051)


HANDLERS: dict[str, Handler] = {
    "mmengine LinearLR + PolyLR as configured": check_schedule,
    "mmseg IoUMetric": check_scores,
}
