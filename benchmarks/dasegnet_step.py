"""ST-DASegNet's training step against the published order of operations: equal parameters, time and memory.

Published: four student forwards, decoders that stack all levels at full size before they fuse them, a teacher whose
graph is kept, discriminator forwards whose outputs nobody uses, seven optimizers, five backward calls. Ours: source and
target as one batch, levels fused at their own sizes, teacher without graph, one backward, three optimizers. Both start
from the same weights and see the same images in one process; rounds are interleaved and ratios are taken within a
round. Peak memory is that of a process of its own per formulation.

    python benchmarks/dasegnet_step.py [--student NAME] [--teacher decoder_only_t|single_t] [--rounds N]
"""

import argparse
import copy
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from rsseg.data.streams import Batch, Samples
from rsseg.inference.machine import keep_heap
from rsseg.layers.blocks import resize
from rsseg.layers.decoders import SegFormerHead
from rsseg.layers.losses import cross_entropy
from rsseg.methods.dasegnet.adversarial import gan_loss, spatial_softmax
from rsseg.methods.dasegnet.method import DASegNetMethod, build_method
from rsseg.methods.dasegnet.recipe import DASegNetRecipe
from rsseg.methods.dasegnet.self_training import pseudo_labels
from rsseg.task import ClassInfo, Task
from rsseg.training.step import build_optimizers

BATCH, SIDE, CLASSES = 2, 192, 6
GOAL, GOAL_BF16, GOAL_MEMORY, LARGEST_DIFFERENCE, STEPS = 1.05, 1.6, 0.9, 1e-5, 20

Step = Callable[[int], None]


def make_method(student: str, teacher: str, *, sgd: bool = False) -> DASegNetMethod:
    """The method with random weights; AdamW and Adam as published for MiT, or SGD with the learning rates of ResNet."""
    torch.manual_seed(0)
    disc = {"name": "adam", "lr": 1e-5, "betas": [0.9, 0.99], "weight_decay": 0.0}
    main = {"lr": 6e-5, "weight_decay": 0.01}
    if sgd:
        disc, main = ({"name": "sgd", "lr": lr, "momentum": 0.9, "weight_decay": 0.0} for lr in (1e-5, 1e-3))
    classes = tuple(ClassInfo(name=str(i), value=i, color=(i, i, i)) for i in range(CLASSES))
    task = Task(name="bench", classes=classes, bands=("red", "green", "blue"), scale=(1 / 255,) * 3, offset=(0.0,) * 3)
    recipe = DASegNetRecipe.model_validate(
        {
            "method": "dasegnet",
            "name": "bench",
            "data": {"path": "unused", "augment": {"crop_size": SIDE}},
            "backbone": {"name": student, "weights": "random"},
            "decoder": {"channels": 256, "dropout": 0.0},
            "adversarial": {"convs": 1},
            "self_training": {"confidence": 0.2, "teacher": {"type": teacher}},
            "optimizers": {"main": main, "disc_source": disc, "disc_target": disc},
        }
    )
    return build_method(recipe, task).train()


def make_batch() -> Batch:
    valid = torch.ones(BATCH, SIDE, SIDE, dtype=torch.bool)
    masks = torch.randint(0, CLASSES, (BATCH, SIDE, SIDE))
    return {
        "source": Samples(torch.rand(BATCH, 3, SIDE, SIDE), valid, masks),
        "target": Samples(torch.rand(BATCH, 3, SIDE, SIDE), valid),
    }


def stacked(head: SegFormerHead, maps: Sequence[Tensor]) -> Tensor:
    """The decoder as published: every level resized, all stacked, one convolution."""
    size = maps[0].shape[-2:]
    levels = [resize(projection(level), size) for projection, level in zip(head.projections, maps, strict=True)]
    return head.classifier(head.fusion(torch.cat(levels, dim=1)))


class Published:
    """The authors' order of operations, with our modules."""

    def __init__(self, method: DASegNetMethod, batch: Batch, *, sgd: bool = False) -> None:
        self.method, self.batch = method, batch
        net = method.segmenter
        self.trained = (net.backbone_source, net.backbone_target, net.decoder_source, net.decoder_target, net.neck)
        self.discs = (method.disc_source, method.disc_target)
        self.optimizers: list[torch.optim.Optimizer] = []
        for group in method.param_groups()["main"]:
            decay = 0.01 if group.weight_decay is None else group.weight_decay
            self.optimizers.append(
                torch.optim.SGD(group.params, lr=1e-3, momentum=0.9)
                if sgd
                else torch.optim.AdamW(group.params, lr=6e-5, weight_decay=decay)
            )
        self.disc_optimizers = [
            torch.optim.SGD(d.parameters(), lr=1e-5, momentum=0.9)
            if sgd
            else torch.optim.Adam(d.parameters(), lr=1e-5, betas=(0.9, 0.99))
            for d in self.discs
        ]

    def step(self, number: int) -> None:
        if number:
            self.average(number)
        for optimizer in (*self.optimizers, *self.disc_optimizers):
            optimizer.zero_grad()
        self.require(self.discs, False)
        self.require(self.trained, True)
        features = self.segmenter_loss()
        for optimizer in self.optimizers:
            optimizer.step()
        self.require(self.trained, False)
        for disc, optimizer, (real, fake) in zip(self.discs, self.disc_optimizers, features, strict=True):
            self.require((disc,), True)
            self.gan(disc, real.detach(), real=True).backward()
            self.gan(disc, fake.detach(), real=False).backward()
            optimizer.step()
            self.require((disc,), False)

    def segmenter_loss(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        method, net, config = self.method, self.method.segmenter, self.method.recipe.self_training
        source, target = self.batch["source"], self.batch["target"]
        s2s, t2s = net.backbone_source(source.images), net.backbone_source(target.images)
        s2t, t2t = net.backbone_target(source.images), net.backbone_target(target.images)
        refined_s2s, refined_s2t = net.neck(s2s, s2t)
        refined_t2s, refined_t2t = net.neck(t2s, t2t)
        out_s2s, out_t2s = stacked(net.decoder_source, refined_s2s), stacked(net.decoder_source, refined_t2s)
        out_s2t, out_t2t = stacked(net.decoder_target, refined_s2t), stacked(net.decoder_target, refined_t2t)
        teacher = method.teacher
        averaged = teacher.averaged
        if config.teacher.type == "single_t":
            again = net.neck(net.backbone_source(target.images), averaged("backbone_target")(target.images))
            taught = stacked(net.decoder_source, again[0]), stacked(averaged("decoder_target"), again[1])
        else:
            taught = (
                stacked(averaged("decoder_source"), refined_t2s),
                stacked(averaged("decoder_target"), refined_t2t),
            )
        labels = (taught[0] + taught[1]) / 2
        pseudo = pseudo_labels(labels.detach(), target.images.shape[-2:], target.valid, config)
        loss = sum(cross_entropy(out, source.masks, divisor="all") for out in (out_s2s, out_s2t))
        for out in (out_t2s, out_t2t):
            loss = loss + config.weight * cross_entropy(out, pseudo.labels, pixel_weights=pseudo.weights, divisor="all")
        pairs = ((s2s[-1], t2s[-1]), (t2t[-1], s2t[-1]))
        for disc, (real, fake) in zip(self.discs, pairs, strict=True):
            self.gan(disc, real, real=True)  # published: computed, and not used
            loss = loss + self.gan(disc, fake, real=True)
        loss.backward()
        return pairs

    def gan(self, disc: nn.Module, features: Tensor, *, real: bool) -> Tensor:
        logits = resize(disc(spatial_softmax(features)), (SIDE, SIDE))
        return 0.005 * gan_loss(logits, real=real)

    def average(self, number: int) -> None:
        decay = min(1 - 1 / (number + 1), 0.999)
        for part in self.method.teacher.averages:
            averaged, student = self.method.teacher.averaged(part), self.method.segmenter.get_submodule(part)
            for own, other in zip(averaged.parameters(), student.parameters(), strict=True):
                own.data = decay * own.data + (1 - decay) * other.data

    @staticmethod
    def require(modules: tuple[nn.Module, ...], on: bool) -> None:
        for module in modules:
            module.requires_grad_(on)


class Ours:
    """The product's step as the trainer runs it."""

    def __init__(self, method: DASegNetMethod, batch: Batch, *, bf16: bool = False) -> None:
        self.method, self.batch, self.bf16 = method, batch, bf16
        self.optimizers = build_optimizers(method, method.recipe.optimizers)

    def step(self, number: int) -> None:
        if number:
            self.method.after_optimizer_step(number - 1)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.bf16):
            losses = self.method(self.batch, number).losses
        torch.stack(list(losses.values())).sum().backward()
        for optimizer in self.optimizers.values():
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)


def seconds(step: Step, number: int) -> float:
    start = time.perf_counter()
    step(number)
    return time.perf_counter() - start


def largest_difference(published: DASegNetMethod, ours: DASegNetMethod) -> tuple[float, str]:
    """Relative L2 difference of the part that differs most.

    Not of each tensor: a bias before a norm, or of attention's keys, has no gradient but rounding, which Adam enlarges.
    """
    parts = {}
    for name, module in ours.named_modules():
        if name.count(".") == 1 and list(module.parameters()) and name.startswith(("segmenter", "disc")):
            own, other = (
                torch.cat([p.detach().flatten() for p in m.parameters()])
                for m in (module, published.get_submodule(name))
            )
            parts[name] = float((own - other).norm() / other.norm())
    worst = max(parts, key=lambda name: parts[name])
    return parts[worst], worst


def difference_under_sgd(student: str, teacher: str) -> tuple[float, str]:
    """`largest_difference` after `STEPS` steps of SGD, which passes rounding on as it is."""
    batch = make_batch()
    first = make_method(student, teacher, sgd=True)
    methods = [first, copy.deepcopy(first)]
    steps = Published(methods[0], batch, sgd=True).step, Ours(methods[1], batch).step
    for number in range(STEPS):
        for step in steps:
            step(number)
    return largest_difference(*methods)


def peak_mb(student: str, teacher: str, formulation: str) -> float:
    """Growth of a process's peak memory by three steps, MB."""
    command = [sys.executable, __file__, "--student", student, "--teacher", teacher, "--peak", formulation]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def print_peak(student: str, teacher: str, formulation: str) -> None:
    method, batch = make_method(student, teacher), make_batch()
    runner = Published(method, batch) if formulation == "published" else Ours(method, batch)
    before = own_peak_mb()
    for number in range(3):
        runner.step(number)
    print(own_peak_mb() - before)


def own_peak_mb() -> float:
    """Peak memory of this process since it was started; `getrusage` would begin with that of the parent."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) / 1024


def compare(student: str, teacher: str, rounds: int) -> bool:
    batch = make_batch()
    first = make_method(student, teacher)
    methods = {name: copy.deepcopy(first) for name in ("published", "ours", "bf16")}
    runners: dict[str, Step] = {
        "published": Published(methods["published"], batch).step,
        "ours": Ours(methods["ours"], batch).step,
        "bf16": Ours(methods["bf16"], batch, bf16=True).step,
    }
    times: dict[str, list[float]] = {name: [] for name in runners}
    for number in range(max(STEPS, rounds)):
        for name, step in runners.items():
            if name != "bf16" or number < rounds + 1:
                times[name].append(seconds(step, number))
    enlarged, part = largest_difference(methods["published"], methods["ours"])
    difference, where = difference_under_sgd(student, teacher)
    met = difference <= LARGEST_DIFFERENCE
    print(f"{teacher}: relative difference of the parameters after {STEPS} steps")
    print(f"  under SGD {difference:.1e} ({where}), goal 1e-5")
    print(f"  under AdamW, which enlarges rounding, {enlarged:.1e} ({part})")
    for name, goal in (("ours", GOAL), ("bf16", GOAL_BF16)):
        pairs = list(zip(times["published"], times[name], strict=False))[1 : rounds + 1]  # the first step warms up
        ratios = sorted(a / b for a, b in pairs)
        ratio = statistics.median(ratios)
        milliseconds = [1e3 * statistics.median(column) for column in zip(*pairs, strict=True)]
        print(
            f"  {name}: published {milliseconds[0]:.0f} ms, ours {milliseconds[1]:.0f} ms, ratio {ratio:.2f} "
            f"[{ratios[0]:.2f}-{ratios[-1]:.2f}], goal {goal}"
        )
        met &= ratio >= goal
    memory = {formulation: peak_mb(student, teacher, formulation) for formulation in ("published", "ours")}
    share = memory["ours"] / memory["published"]
    print(
        f"  peak of a step: published {memory['published']:.0f} MB, ours {memory['ours']:.0f} MB, "
        f"{share:.2f} of it, goal {GOAL_MEMORY}"
    )
    return met and share <= GOAL_MEMORY


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--student", default="mit_b0")
    parser.add_argument("--teacher", choices=("decoder_only_t", "single_t"))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--peak", choices=("published", "ours"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.peak:
        print_peak(options.student, options.teacher, options.peak)
        return
    keep_heap()
    print(f"{options.student}, {BATCH} + {BATCH} images of {SIDE}, fp32 and bf16, one thread, {options.rounds} rounds")
    kinds = (options.teacher,) if options.teacher else ("decoder_only_t", "single_t")
    met = [compare(options.student, kind, options.rounds) for kind in kinds]
    print("goals met" if all(met) else "A GOAL IS MISSED")


if __name__ == "__main__":
    main()
