"""Handlers of golden cases: the learning-rate schedule and the scores of evaluation."""

import torch

from rsseg.metrics import ConfusionMatrix, scores
from rsseg.recipe import load_recipe
from rsseg.training.schedule import lr_at
from tests.golden.harness import Case, Handler


def check_schedule(case: Case) -> None:
    """The rates of the packaged recipe that the case is named after, over the case's own number of iterations."""
    recipe = load_recipe(case.name.removeprefix("lr_schedule_"))
    optimizer = recipe.optimizers["main"]
    total = int(case.meta["iterations"])
    assert recipe.trainer.steps == total
    steps = case.tensors["in.iteration"].tolist()
    rates = [lr_at(optimizer.schedule, optimizer.lr, step, total) for step in steps]
    case.check(torch.tensor(rates, dtype=torch.float64), "out.lr")
    if peak := case.meta.get("peak"):
        all_rates = [lr_at(optimizer.schedule, optimizer.lr, step, total) for step in range(total)]
        torch.testing.assert_close(max(all_rates), float(peak["lr"]), **case.tolerance("forward"))
        torch.testing.assert_close(all_rates[peak["iteration"]], float(peak["lr"]), **case.tolerance("forward"))


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
