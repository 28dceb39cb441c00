"""All GPU figures in one JSON: training steps eager, as CUDA graphs and bare, the trainer around them, and scenes.

    python benchmarks/gpu.py [--output gpu.json] [--only steps|scene] [--seconds 240]
    python benchmarks/gpu.py --toy            # a minute on a CPU, to see that it runs; its figures mean nothing

Networks have random weights, so nothing is downloaded. Each figure is written to `--output` once it is measured; a
part that fails is recorded under `errors`, and what does not fit into `--seconds` under `skipped`. Ratios compare
figures of this run. Without a GPU, figures of graphs are null.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import rasterio
import torch
from torch.amp.grad_scaler import GradScaler

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.gpu_cases import CLASSES, TOY, Size, recipes, write_dataset  # noqa: E402
from benchmarks.scenes import make_segmenter, make_task, write_scene  # noqa: E402
from rsseg.data.streams import Batch, training_batches  # noqa: E402
from rsseg.inference.device import resolve_precision  # noqa: E402
from rsseg.inference.machine import keep_heap  # noqa: E402
from rsseg.inference.network import ready_to_predict  # noqa: E402
from rsseg.methods.registry import method_for  # noqa: E402
from rsseg.recipe import Recipe  # noqa: E402
from rsseg.scene.memory import prepare_network  # noqa: E402
from rsseg.scene.options import SceneOptions  # noqa: E402
from rsseg.scene.plan import prepare_scene  # noqa: E402
from rsseg.scene.predict import predict_scene  # noqa: E402
from rsseg.training.checkpoints import Parts  # noqa: E402
from rsseg.training.device import Hardware, float32_products  # noqa: E402
from rsseg.training.graphs import WARM_UP, GraphStep, make_step  # noqa: E402
from rsseg.training.progress import Progress, StepReport  # noqa: E402
from rsseg.training.run import train  # noqa: E402
from rsseg.training.step import build_optimizers  # noqa: E402


@dataclass
class Report:
    """The figures so far, and the time that is left."""

    output: Path
    seconds: float
    start: float = field(default_factory=time.monotonic)
    values: dict[str, Any] = field(default_factory=dict)

    def put(self, **figures: Any) -> None:
        """Add figures and write all of them."""
        self.values |= figures
        part = self.output.with_name(f".{self.output.name}.part")
        part.write_text(json.dumps(self.values, indent=1))
        part.replace(self.output)

    @contextmanager
    def part(self, name: str, needed: float) -> Iterator[bool]:
        """True if a part that takes about `needed` seconds still fits; its errors are recorded."""
        fits = time.monotonic() - self.start + needed < self.seconds
        if not fits:
            self.put(skipped=[*self.values.get("skipped", []), name])
        try:
            yield fits
        except Exception as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            self.put(errors=self.values.get("errors", {}) | {name: lines[0]})
        print(f"{name}: {time.monotonic() - self.start:.0f} s so far", file=sys.stderr, flush=True)


class Steps:
    """A method with its optimizers, and batches on the device."""

    def __init__(self, recipe: Recipe, hardware: Hardware, graphs: str) -> None:
        torch.manual_seed(0)
        self.recipe = recipe.model_copy(update={"trainer": recipe.trainer.model_copy(update={"graphs": graphs})})
        self.method = method_for(recipe, make_task(CLASSES)).to(hardware.device).train()
        scaler = GradScaler(hardware.device.type, enabled=hardware.amp_dtype == torch.float16)
        parts = Parts(self.method, None, build_optimizers(self.method, recipe.optimizers), scaler)
        self.messages: list[str] = []
        self.step = make_step(parts, self.recipe, hardware, self.messages.append)
        self.device, self.number = hardware.device, 0
        self.batches = first_batches(self.recipe, hardware.device, 4)

    def run(self, count: int = 1) -> list[float]:
        """Some steps; losses of the last one."""
        for _ in range(count):
            micro = self.step.gradients(self.batches[self.number % len(self.batches)], self.number, 0)
            self.step.update()
            self.method.after_optimizer_step(self.number)
            self.number += 1
        return [float(loss) for loss in micro.output.losses.values()]

    def bare(self) -> Callable[[], None] | None:
        """The recorded kernels alone; None without graphs."""
        graphs = self.step._micro if isinstance(self.step, GraphStep) else None
        if graphs is None:
            return None

        def replay() -> None:
            graphs._forward()
            graphs._backward()
            self.step._update()  # type: ignore[union-attr]

        return replay


def first_batches(recipe: Recipe, device: torch.device, count: int) -> list[Batch]:
    task = make_task(CLASSES)
    alone = recipe.model_copy(update={"trainer": recipe.trainer.model_copy(update={"workers": 0})})
    batches = training_batches(alone, method_for(recipe, task).streams, task, device=device, start_step=0)
    made = list(islice(batches, count))
    batches.close()
    return made


def milliseconds(work: Callable[[], object], count: int, device: torch.device) -> float:
    """Median over three rounds of the time per call."""
    rounds = []
    for _ in range(3):
        synchronize(device)
        start = time.perf_counter()
        for _ in range(count):
            work()
        synchronize(device)
        rounds.append(1e3 * (time.perf_counter() - start) / count)
    return statistics.median(rounds)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def busy_share(work: Callable[[], object], count: int, device: torch.device) -> float | None:
    """Share of the time in which the GPU computes or copies; None on a CPU."""
    if device.type != "cuda":
        return None
    from torch.profiler import ProfilerActivity, profile

    synchronize(device)
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        start = time.perf_counter()
        for _ in range(count):
            work()
        synchronize(device)
        seconds = time.perf_counter() - start
    # Kernels of several streams overlap: count the union of their times.
    spans = sorted(
        (event.time_range.start, event.time_range.end)
        for event in seen.events() or []
        if event.device_type == torch.autograd.DeviceType.CUDA
    )
    total, end = 0.0, float("-inf")
    for first, last in spans:
        total += max(last - max(first, end), 0.0)
        end = max(end, last)
    return total / 1e6 / seconds


def step_figures(recipe: Recipe, hardware: Hardware, size: Size) -> dict[str, Any]:
    """Milliseconds per step, GPU busy, and the largest difference between graphs and eager steps in float32."""
    device = hardware.device
    eager, recorded = Steps(recipe, hardware, "off"), Steps(recipe, hardware, "auto")
    for steps in (eager, recorded):
        steps.run(WARM_UP + 2)
    bare = recorded.bare()
    figures: dict[str, Any] = {"eager_ms": milliseconds(eager.run, size.steps, device)}
    figures |= {"eager_busy": busy_share(eager.run, 10, device), "messages": recorded.messages}
    if bare is None:
        return figures | {"graph_ms": None, "bare_ms": None, "speedup": None, "graph_busy": None}
    figures["graph_ms"] = milliseconds(recorded.run, size.steps, device)
    figures["bare_ms"] = milliseconds(bare, size.steps, device)
    figures["graph_busy"] = busy_share(recorded.run, 20, device)
    figures["speedup"] = figures["eager_ms"] / figures["graph_ms"]
    return figures


def equality(recipe: Recipe, device: torch.device, count: int) -> dict[str, float | None]:
    """Float32 without TF32: relative difference of losses and weights after some steps, graphs against eager ones."""
    with float32_products(tf32=False):
        losses, weights = [], []
        for graphs in ("off", "auto"):
            steps = Steps(recipe, Hardware(device), graphs)
            losses.append(torch.tensor(steps.run(count)))
            weights.append(torch.cat([p.detach().flatten().cpu() for p in steps.method.parameters()]))
    recorded = steps.bare() is not None
    pairs = (("loss", losses), ("weight", weights))
    return {f"{name}_difference": float((b - a).norm() / a.norm()) if recorded else None for name, (a, b) in pairs}


class Clock(Progress):
    """Seconds per step between reports, and the messages."""

    def __init__(self) -> None:
        self.marks: list[tuple[int, float]] = []
        self.said: list[str] = []

    def on_step(self, report: StepReport) -> None:
        self.marks.append((report.step, time.perf_counter()))

    def on_message(self, text: str) -> None:
        self.said.append(text)

    def step_ms(self) -> float:
        """Median over the intervals of the second half."""
        pairs = list(zip(self.marks, self.marks[1:], strict=False))
        return statistics.median(1e3 * (b[1] - a[1]) / (b[0] - a[0]) for a, b in pairs[len(pairs) // 2 :])


def measure_steps(report: Report, folder: Path, size: Size, device: torch.device) -> None:
    """Training: steps, trainer, loader, and equality."""
    bf16 = resolve_precision("auto", device) == torch.bfloat16
    hardware = Hardware(device, torch.bfloat16 if bf16 else None)
    every = recipes(write_dataset(folder / "data", size.image), size, str(device))
    for name, recipe in every.items():
        with report.part(f"{name} step", 15) as fits:
            if fits:
                report.put(**{name: step_figures(recipe, hardware, size)})
    for name, recipe in every.items():
        with report.part(f"{name} trainer", 20) as fits:
            if fits:
                clock = Clock()
                train(recipe, output=folder / "runs", progress=clock)
                figures = report.values.get(name, {}) | {"trainer_ms": clock.step_ms(), "trainer_messages": clock.said}
                bare = figures.get("bare_ms")
                figures["trainer_over_bare"] = bare and bare / figures["trainer_ms"]
                report.put(**{name: figures})
    for name, recipe in every.items():
        with report.part(f"{name} equality", 12) as fits:
            if fits:
                report.put(**{name: report.values.get(name, {}) | equality(recipe, device, size.equal_steps)})


def decode_rate(scene: Path, threads: int) -> float:
    """Mpx/s of threads that read rows of blocks, each with a handle of its own."""
    with rasterio.open(scene) as file:
        height, width = file.height, file.width
    tops = list(range(0, height, 512))

    def read(number: int) -> None:
        with rasterio.open(scene) as file:
            for top in tops[number::threads]:
                file.read(window=((top, min(top + 512, height)), (0, width)))

    start = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(read, range(threads)))
    return height * width / 1e6 / (time.perf_counter() - start)


def network_rate(size: Size, device: torch.device) -> float:
    """Mpx/s of the prepared network on a batch of eight tiles that lie on the device."""
    network, dtype = ready_to_predict(make_segmenter(CLASSES), device, resolve_precision("auto", device))
    batch = torch.rand(8, 3, size.tile, size.tile, device=device).contiguous(memory_format=torch.channels_last)

    @torch.inference_mode()
    def forward() -> None:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            network.low_resolution_logits(batch)

    forward()
    return 1e3 * batch[:, 0].numel() / 1e6 / milliseconds(forward, 2 if device.type == "cpu" else 20, device)


def measure_scene(report: Report, folder: Path, size: Size, device: torch.device) -> None:
    """Scenes: every form of input and output, against network and decoding alone."""
    threads, segmenter = os.cpu_count() or 1, make_segmenter(CLASSES)
    pixels = size.scene**2 / 1e6
    figures: dict[str, Any] = {"threads": threads, "megapixels": pixels}
    with report.part("network alone", 10) as fits:
        if fits:
            figures["network_mpx_s"] = network_rate(size, device)
    for compress in ("none", "deflate"):
        with report.part(f"scene {compress}", 45) as fits:
            if not fits:
                continue
            scene = write_scene(folder / f"{compress}.tif", size.scene, compress=compress)
            figures[f"decode_{compress}_mpx_s"] = decode_rate(scene, threads)
            for output in ("gtiff", "cog"):
                options = SceneOptions(device=str(device), format=output, overwrite=True)
                target = folder / "out.tif"
                plan = prepare_scene(prepare_network(segmenter, options), scene, target, options).describe()
                figures["redundancy"] = plan.redundancy
                seconds = [predict_scene(segmenter, scene, target, options).seconds for _ in range(2)]
                figures[f"{compress}_{output}_s"] = {"first": seconds[0], "second": seconds[1]}
                report.put(scene=figures)
    plain, cog, deflate = (
        figures.get(f"{name}_s", {}).get("second") for name in ("none_gtiff", "none_cog", "deflate_gtiff")
    )
    if plain and "network_mpx_s" in figures:
        figures["plain_over_network"] = figures["redundancy"] * pixels / plain / figures["network_mpx_s"]
    if plain and cog:
        figures |= {"cog_extra_s": cog - plain, "cog_mpx_s": pixels / cog}
    if deflate:
        limit = min(figures["decode_deflate_mpx_s"], figures.get("network_mpx_s", float("inf")))
        figures["deflate_over_decode"] = pixels / deflate / limit
    report.put(scene=figures)


def judge(values: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Each goal with its figure; null where it was not measured."""
    scene = values.get("scene", {})
    goals: dict[str, tuple[Any, float, bool]] = {
        "plain GeoTIFF over the network alone": (scene.get("plain_over_network"), 0.5, True),
        "COG, seconds more": (scene.get("cog_extra_s"), 1.5, False),
        "COG, Mpx/s": (scene.get("cog_mpx_s"), 50, True),
        "deflate input over decoding alone": (scene.get("deflate_over_decode"), 0.8, True),
    }
    for name in ("ktda", "mtdf", "dasegnet"):
        found = values.get(name, {})
        goals |= {
            f"{name} graph over eager": (found.get("speedup"), 2.5, True),
            f"{name} loss difference": (found.get("loss_difference"), 1e-5, False),
            f"{name} weight difference": (found.get("weight_difference"), 1e-5, False),
            f"{name} trainer over bare": (found.get("trainer_over_bare"), 0.9, True),
            f"{name} GPU busy": (found.get("graph_busy"), 0.9, True),
        }
    return {
        name: {"goal": goal, "value": value, "met": None if value is None else value >= goal if more else value <= goal}
        for name, (value, goal, more) in goals.items()
    }


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("gpu.json"))
    parser.add_argument("--only", choices=["steps", "scene"])
    parser.add_argument("--seconds", type=float, default=240)
    parser.add_argument("--toy", action="store_true")
    chosen = parser.parse_args(arguments)
    if not chosen.toy and not torch.cuda.is_available():
        parser.error("there is no GPU; --toy runs on a CPU")
    device, size = torch.device("cuda" if torch.cuda.is_available() else "cpu"), TOY if chosen.toy else Size()
    keep_heap()
    report = Report(chosen.output, chosen.seconds)
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    report.put(device=card, torch=torch.__version__, toy=chosen.toy)
    with tempfile.TemporaryDirectory() as name:
        for part, measure in (("steps", measure_steps), ("scene", measure_scene)):
            if chosen.only in (None, part):
                measure(report, Path(name), size, device)
    report.put(goals=judge(report.values), seconds=time.monotonic() - report.start)
    print(json.dumps(report.values, indent=1))
    return report.values


if __name__ == "__main__":
    main()
