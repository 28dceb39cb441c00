"""What training tells the outside: plan, step, evaluation, result. Plain data, ready for JSON."""

from collections.abc import Mapping
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from rsseg.metrics import Scores
from rsseg.runs import ExitState


class _Data(BaseModel):
    model_config = ConfigDict(frozen=True)


class SplitPlan(_Data):
    """Images that feed a training stream or an evaluation."""

    path: str
    split: str
    images: int
    digest: str
    """SHA-256 over the image names."""
    batch_size: int
    """Samples per process and micro-step; of an evaluation: tiles."""


class TrainPlan(_Data):
    """What a run will do, known before anything is built."""

    method: str
    name: str
    title: str
    reference: str
    device: str
    device_name: str
    amp: str
    processes: int
    seed: int
    steps: int
    grad_accum_steps: int
    streams: Mapping[str, SplitPlan]
    validation: SplitPlan | None
    """None: the run is not evaluated and ships its last weights."""
    selection: str
    """What chooses the weights that ship, in words."""
    classes: tuple[str, ...]
    bands: tuple[str, ...]
    backbones: Mapping[str, str]
    """Role in the recipe -> name, weights and licence."""
    weight_hashes: Mapping[str, str]
    """Role -> SHA-256 of the weight file, where there is one."""
    start_step: int = 0
    """Optimizer steps that the resumed run has already done."""
    parameters: int | None = None
    """Of the shipped network; known once it is built."""
    trainable: int | None = None
    run: Path | None = None

    @property
    def used(self) -> dict[str, str]:
        """Split hash -> `training` or `selection`: a score on these images is no test."""
        return {stream.digest: "training" for stream in self.streams.values()} | (
            {self.validation.digest: "selection"} if self.validation else {}
        )

    def text(self) -> str:
        """At most twelve lines for the screen."""
        lines = [f"{self.method}  {self.name}" + (f"  ({self.title})" if self.title else "")]
        lines += [f"  {role}: {backbone}" for role, backbone in self.backbones.items()]
        if self.parameters is not None:
            lines.append(
                f"  parameters: {_millions(self.parameters)} shipped, {_millions(self.trainable or 0)} trained"
            )
        lines.append(f"  classes: {', '.join(self.classes)};  bands: {', '.join(self.bands)}")
        for name, stream in self.streams.items():
            taken = self.steps * self.grad_accum_steps * self.processes * stream.batch_size
            lines.append(
                f"  {name}: {stream.images} images of {stream.path} ({stream.split}), batch {stream.batch_size}, "
                f"{taken / stream.images:.1f} passes"
            )
        validation = self.validation
        images = f"{validation.images} images ({validation.split})" if validation else "none"
        lines.append(f"  validation: {images}; {self.selection}")
        processes = f" x {self.processes} processes" if self.processes > 1 else ""
        lines.append(f"  {self.device_name} ({self.device}){processes}, autocast {self.amp}, seed {self.seed}")
        accumulated = f" of {self.grad_accum_steps} micro-steps" if self.grad_accum_steps > 1 else ""
        resumed = f", going on after step {self.start_step}" if self.start_step else ""
        lines.append(f"  {self.steps} steps{accumulated}{resumed}")
        if self.run is not None:
            lines.append(f"  {self.run}")
        return "\n".join(lines)


class StepReport(_Data):
    """Means since the previous report."""

    step: int
    """Optimizer steps done."""
    total: int
    losses: Mapping[str, float]
    """As the method weights them; their sum is `loss`."""
    loss: float
    logs: Mapping[str, float]
    learning_rates: Mapping[str, float]
    """Optimizer -> rate of the last step."""
    images_per_s: float
    memory_mb: float
    eta_s: float


class EvaluationReport(_Data):
    """One evaluation on the validation split."""

    step: int
    total: int
    scores: Scores
    counts: tuple[tuple[int, ...], ...]
    """(K + 1) rows of K: the confusion matrix, and the predictions on unlabeled pixels."""
    images: int
    seconds: float
    score: float | None
    """The monitored one."""
    entropy: float | None = None
    """Measured instead of scores where no labels are read."""
    best: float | None
    """The best so far, this one included."""
    improved: bool


class TrainResult(_Data):
    """How a run ended."""

    run: Path
    state: ExitState
    reason: str
    """Why it ended: all steps, patience, time."""
    steps: int
    monitor: str
    best_score: float | None
    best_step: int | None
    scores: Scores | None
    """Validation scores of the shipped weights, if they were evaluated."""
    model: Path
    seconds: float
    next_command: str

    def text(self) -> str:
        """Score, place and next command."""
        best = "no validation score" if self.best_score is None else f"best {self.monitor} {self.best_score:.4f}"
        at = "" if self.best_step is None else f" at step {self.best_step}"
        return f"{best}{at} ({self.reason}, {self.steps} steps)\n{self.model}\n{self.next_command}"


def _millions(count: int) -> str:
    return f"{count / 1e6:.2f} M"
