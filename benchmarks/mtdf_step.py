"""A training step of RS-MTDF against the published formulation, in one process, equal weights and batches.

Published: frozen teachers are parts of the student's module, so that the average updates them too; all four maps of
every pass are computed and normalized; features and fusion maps are resized before they are projected; the optimizer is
torch's default loop. Ours: teachers outside the module, layers in the cheaper order, fused optimizer and average.

    python benchmarks/mtdf_step.py [--crop 98] [--small 42] [--batch 4] [--rounds 5] [--threads 1]

Networks have their published sizes, images a fifth of them (518 and 224 pixels), so that it ends on a CPU. CLIP's text
tower, which the released code also holds, is left out.

Prints one ratio per line with its lowest and highest round, the memory held between steps, and what inference costs.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rsseg.backbones.backbone import Backbone, create_backbone
from rsseg.config import OptimizerConfig
from rsseg.data.streams import Batch, Samples
from rsseg.inference.network import ready_to_predict
from rsseg.layers.decoders import FusionBlock
from rsseg.methods.mtdf.method import MTDFMethod, assemble_method, ema_ratio
from rsseg.methods.mtdf.network import assemble_segmenter
from rsseg.methods.mtdf.recipe import MTDFRecipe
from rsseg.task import ClassInfo, Task
from rsseg.training.step import build_optimizers

TASK = Task(
    name="benchmark",
    classes=tuple(ClassInfo(name=f"c{i}", value=i, color=(i, i, i)) for i in range(7)),
    bands=("red", "green", "blue"),
    scale=(1 / 255,) * 3,
    offset=(0.0,) * 3,
)


def align(x: Tensor, size: tuple[int, ...] | torch.Size) -> Tensor:
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=True)


@dataclass
class Published:
    """The same networks, used as the released code uses them."""

    method: MTDFMethod
    recipe: MTDFRecipe
    whole: nn.ModuleDict = field(init=False)
    average: nn.ModuleDict = field(init=False)

    def __post_init__(self) -> None:
        teachers = {name: copy.deepcopy(t.frozen.module) for name, t in self.method.teachers.items()}
        self.whole = nn.ModuleDict({"student": copy.deepcopy(self.method.student), "teachers": nn.ModuleDict(teachers)})
        self.average = copy.deepcopy(self.whole).requires_grad_(False)
        self.optimizer = torch.optim.AdamW(
            [
                {"params": [p for n, p in self.whole.named_parameters() if "backbone" in n], "lr": 1e-5},
                {"params": [p for n, p in self.whole.named_parameters() if "backbone" not in n], "lr": 4e-4},
            ],
            weight_decay=0.01,
        )

    def forward(self, whole: nn.ModuleDict, images: Tensor, *, distill: bool) -> tuple[Tensor, Tensor]:
        student, size = whole["student"], self.recipe.teachers[1].input_size
        assert size is not None
        x = student.backbone.normalize(images)
        maps = list(student.backbone.forward_normalized(x))
        small = align(x, (size, size))
        features = {"dino": maps[-1], "clip": student.backbone.forward_normalized(small)[-1]}
        translated = {name: t(features[name]) for name, t in student.translators.items()}
        mixed = student.student_weight * maps[-1]
        for name, weight in student.fusion_weights.items():
            mixed = mixed + weight * student.translators[name].back(align(translated[name], maps[-1].shape[-2:]))
        logits = align(self.head(student.head, [*maps[:-1], mixed]), images.shape[-2:])
        if not distill:
            return logits, logits.new_zeros(())
        with torch.no_grad():
            targets = {
                name: t.forward_normalized(small if name == "clip" else x)[-1] for name, t in whole["teachers"].items()
            }
        return logits, torch.stack([F.mse_loss(translated[name], targets[name]) for name in targets]).mean()

    @staticmethod
    def head(head: nn.Module, maps: list[Tensor]) -> Tensor:
        levels = [
            lateral(r(p(x))) for x, p, r, lateral in zip(maps, head.project, head.reassemble, head.lateral, strict=True)
        ]
        sizes = [level.shape[-2:] for level in levels]
        path = levels[3]
        for level in (3, 2, 1, 0):
            block: FusionBlock = head.fuse[level]
            if block.skip is not None:
                path = path + block.skip(levels[level])
            size = sizes[level - 1] if level else (2 * sizes[0][0], 2 * sizes[0][1])
            path = block.project(align(block.refine(path), size))
        return head.predict(path)  # type: ignore[no-any-return]

    def step(self, batch: Batch, step: int) -> float:
        x, u = batch["labeled"], batch["unlabeled"]
        assert x.masks is not None
        assert u.strong is not None
        assert u.mix is not None
        with torch.no_grad():
            probabilities = self.forward(self.average, u.images, distill=False)[0].softmax(1)
            confidence, label = probabilities.max(1)
        box, strong, valid = u.mix[:, 0], u.strong[:, 0].clone(), u.valid.clone()
        for target in (strong, label, confidence, valid):
            where = box[:, None].expand_as(target) if target.ndim == 4 else box
            target[where] = target.flip(0)[where]
        logits, distill = self.forward(self.whole, torch.cat([x.images, strong]), distill=True)
        loss_x = F.cross_entropy(logits[: len(x.images)], x.masks, ignore_index=255)
        loss_u = F.cross_entropy(logits[len(x.images) :], label, reduction="none") * ((confidence >= 0.95) & valid)
        loss = (loss_x + loss_u.sum() / valid.sum() + distill) / 3
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        ratio = ema_ratio(step, 0.996)
        for p, q in zip(self.whole.parameters(), self.average.parameters(), strict=True):
            q.copy_(q * ratio + p.detach() * (1 - ratio))
        return loss.item()


@dataclass
class Ours:
    method: MTDFMethod

    def __post_init__(self) -> None:
        self.optimizer = build_optimizers(self.method, {"main": OptimizerConfig(lr=1e-5)})["main"]
        for group in self.optimizer.param_groups:
            group["lr"] = 1e-5 * group["lr_scale"]

    def step(self, batch: Batch, step: int) -> float:
        loss = torch.stack(list(self.method.training_step(batch, step).losses.values())).sum()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        self.method.after_optimizer_step(step)
        return loss.item()


def make_recipe(crop: int, small_side: int, teacher_dtype: str = "float32") -> MTDFRecipe:
    """ViT-S taught by ViT-B and CLIP's ViT-L, random weights; the second pass at `small_side` pixels."""
    small = {"weights": "random", "out_norm": "all", "pos_embed": "dinov2"}
    dino = small | {"name": "vit_base_patch14_dinov2", "out_indices": [11], "dtype": teacher_dtype}
    clip = {
        "name": "vit_large_patch14_clip_quickgelu_224",
        "weights": "random",
        "out_indices": [23],
        "out_norm": "none",
        "dtype": teacher_dtype,
    }
    return MTDFRecipe.model_validate(
        {
            "method": "mtdf",
            "name": "benchmark",
            "data": {"path": "none", "augment": {"crop_size": crop}},
            "student": small | {"name": "vit_small_patch14_dinov2"},
            "teachers": [
                {"name": "dino", "backbone": dino, "teacher_input": "student_normalized"},
                {"name": "clip", "backbone": clip, "teacher_input": "student_normalized", "input_size": small_side},
            ],
        }
    )


def make_method(recipe: MTDFRecipe) -> MTDFMethod:
    torch.manual_seed(0)
    teachers: Mapping[str, Backbone] = {t.name: create_backbone(t.backbone, TASK) for t in recipe.teachers}
    student = create_backbone(recipe.student, TASK)
    channels = {name: teacher.info.channels[-1] for name, teacher in teachers.items()}
    return assemble_method(recipe, assemble_segmenter(recipe, TASK, student, channels), teachers).train()


def make_batch(crop: int, count: int) -> Batch:
    draw = torch.Generator().manual_seed(1)
    images = torch.rand(3, count, 3, crop, crop, generator=draw)
    valid = torch.ones(count, crop, crop, dtype=torch.bool)
    mix = torch.zeros(count, 1, crop, crop, dtype=torch.bool)
    mix[::2, :, crop // 4 : crop // 2, crop // 4 : crop // 2] = True
    masks = torch.randint(0, TASK.num_classes, (count, crop, crop), generator=draw)
    return {
        "labeled": Samples(images[0], valid, masks),
        "unlabeled": Samples(images[1], valid, None, images[2][:, None], mix),
    }


def held_bytes(modules: list[nn.Module], optimizer: torch.optim.Optimizer) -> int:
    """Parameters, buffers, gradients and optimizer state, each storage once."""
    tensors = [t for m in modules for t in (*m.parameters(), *m.buffers())]
    tensors += [p.grad for m in modules for p in m.parameters() if p.grad is not None]
    tensors += [v for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]
    return sum({t.data_ptr(): t.numel() * t.element_size() for t in tensors}.values())


def paired(rounds: int, actions: Mapping[str, Callable[[], object]]) -> dict[str, list[float]]:
    """Seconds of each action per round, taken in turn so that disturbances hit all."""
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(rounds):
        for name, action in actions.items():
            start = time.perf_counter()
            action()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def report(what: str, slow: list[float], fast: list[float]) -> None:
    ratios = [a / b for a, b in zip(slow, fast, strict=True)]
    print(f"{what}: {statistics.median(ratios):.2f}x [{min(ratios):.2f}-{max(ratios):.2f}]", flush=True)


def benchmark_step(crop: int, small_side: int, batch_size: int, rounds: int) -> None:
    recipe, batch = make_recipe(crop, small_side), make_batch(crop, batch_size)
    method = make_method(recipe)
    published, ours = Published(method, recipe), Ours(method)
    for step in range(2):
        theirs, own = published.step(batch, step), ours.step(batch, step)
        print(f"loss of step {step}: published {theirs:.7f}, ours {own:.7f}, difference {abs(own / theirs - 1):.1e}")
        assert abs(own / theirs - 1) < 1e-5, "the formulations differ"
    modules = [published.whole, published.average]
    theirs_mb = held_bytes(modules, published.optimizer) / 2**20
    frozen = [t.frozen.module for t in method.teachers.values()]
    own_mb = held_bytes([method, *frozen], ours.optimizer) / 2**20
    half = Ours(make_method(make_recipe(crop, small_side, "bfloat16")))
    half.step(batch, 0)
    half_frozen = [t.frozen.module for t in half.method.teachers.values()]
    half_mb = held_bytes([half.method, *half_frozen], half.optimizer) / 2**20
    for name, mb in (("fp32", own_mb), ("bf16 teachers", half_mb)):
        print(f"held between steps, {name}: {mb:.0f} MB, published {theirs_mb:.0f} MB: {1 - mb / theirs_mb:.0%} less")
    actions = {"published": published, "ours": ours, "half": half}
    seconds = paired(rounds, {name: lambda a=a: a.step(batch, 9) for name, a in actions.items()})
    print(f"published step: {statistics.median(seconds['published']):.2f} s")
    report("step, fp32", seconds["published"], seconds["ours"])
    report("step, bf16 teachers", seconds["published"], seconds["half"])


@torch.inference_mode()
def benchmark_inference(rounds: int) -> None:
    """The published student at 518 pixels, as `rsseg predict` runs it, against its bare parts and with one pass."""
    recipe = make_recipe(518, 224)
    channels = {"dino": 768, "clip": 1024}
    shared = [t.model_copy(update={"student_pass": "shared"}) for t in recipe.teachers]
    one = recipe.model_copy(update={"teachers": tuple(shared)})
    cpu = torch.device("cpu")
    student = create_backbone(recipe.student, TASK)
    full, single = (
        ready_to_predict(assemble_segmenter(r, TASK, student, channels), cpu, torch.float32)[0] for r in (recipe, one)
    )
    images = torch.rand(1, 3, 518, 518)

    def bare() -> None:
        align(full.head(full.backbone(images)), (518, 518))
        full.backbone(align(images, (224, 224)))

    actions = {"bare": bare, "two passes": lambda: full(images), "one pass": lambda: single(images)}
    paired(1, actions)
    seconds = paired(rounds, actions)
    report(
        "inference, shipped student over plain DPT student and its second pass (time)",
        seconds["two passes"],
        seconds["bare"],
    )
    report("inference, one pass instead of two", seconds["two passes"], seconds["one pass"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--crop", type=int, default=98, help="pixels, a multiple of 14")
    parser.add_argument("--small", type=int, default=42, help="pixels of CLIP's image, a multiple of 14")
    parser.add_argument("--batch", type=int, default=4, help="labeled images; as many unlabeled ones")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    benchmark_inference(arguments.rounds)
    benchmark_step(arguments.crop, arguments.small, arguments.batch, arguments.rounds)


if __name__ == "__main__":
    main()
