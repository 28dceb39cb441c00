import io

from rsseg.metrics import scores
from rsseg.text import duration
from rsseg.training.progress import EvaluationReport, LineProgress, StepReport, evaluation_line


def step(number: int) -> StepReport:
    return StepReport(
        step=number,
        total=3,
        losses={"seg": 0.5, "distill": 0.25},
        loss=0.75,
        logs={},
        learning_rates={"main": 1e-3},
        images_per_s=12.34,
        memory_mb=100,
        eta_s=3723,
    )


def evaluation() -> EvaluationReport:
    counts = ((3, 1), (0, 0), (0, 0))
    return EvaluationReport(
        step=2,
        total=3,
        scores=scores(counts, ["a", "b"]),
        counts=counts,
        images=4,
        seconds=1.0,
        score=0.4,
        best=0.4,
        improved=True,
    )


def test_lines_come_once_per_interval_and_at_the_end() -> None:
    stream = io.StringIO()
    progress = LineProgress(stream, interval_s=1e9)
    for number in (1, 2, 3):
        progress.on_step(step(number))
    progress.on_evaluation(evaluation())
    progress.on_message("note")
    lines = stream.getvalue().splitlines()
    assert [line.split("  ")[0] for line in lines] == ["step 1/3", "step 3/3", "step 2/3", "note"]
    assert "loss 0.75 (seg 0.5 distill 0.25)  lr 0.001  12.3 images/s  100 MB  62 min left" in lines[0]
    assert lines[2].endswith("validation of 4 images: mIoU 0.3750  mF1 0.4286  OA 0.7500  (best)")


def test_evaluation_without_a_score_is_not_called_best() -> None:
    assert evaluation_line(evaluation()).endswith("(best)")
    assert "best" not in evaluation_line(evaluation().model_copy(update={"score": None}))


def test_duration_has_a_unit_that_suits_it() -> None:
    assert (duration(65.4), duration(3600), duration(12_600)) == ("65 s", "60 min", "3.5 h")
