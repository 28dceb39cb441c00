"""The training side of ST-DASegNet: adversarial alignment and self-training in one summed loss."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from rsseg.data.streams import Batch, Samples, StreamSpec
from rsseg.layers.losses import cross_entropy
from rsseg.methods.base import Method, ParamGroup, StepOutput
from rsseg.methods.dasegnet.adversarial import Alignment, adversarial_terms
from rsseg.methods.dasegnet.discriminator import PatchDiscriminator
from rsseg.methods.dasegnet.mixing import class_mix, hide_patches
from rsseg.methods.dasegnet.network import DASegNet, Styles
from rsseg.methods.dasegnet.pseudo_labels import PseudoLabels, pseudo_labels
from rsseg.methods.dasegnet.recipe import DASegNetRecipe, SelfTrainingConfig
from rsseg.methods.dasegnet.teacher import Teacher


@dataclass(frozen=True)
class Logits:
    """Both decoders' logits (B, K, h, w) of the same images."""

    source: Tensor
    target: Tensor


@dataclass(frozen=True)
class Lesson:
    """Target images that the students learn from: their logits on them, and what the teacher says."""

    name: str
    weight: float
    logits: Logits
    pseudo: PseudoLabels


@dataclass(frozen=True)
class Passes:
    """Everything that one step computes before its losses; `target` is None where no loss and no teacher needs it."""

    source: Styles
    logits: Logits
    target: Styles | None = None
    lessons: tuple[Lesson, ...] = ()


class DASegNetMethod(Method):
    """One backward trains all: discriminators see detached features, features see detached discriminators.

    So every parameter gets gradient from its own losses only, which equals the published alternation of optimizers.
    """

    class_weights_source: Tensor | None
    class_weights_target: Tensor | None

    def __init__(
        self,
        recipe: DASegNetRecipe,
        segmenter: DASegNet,
        *,
        discriminators: tuple[PatchDiscriminator, PatchDiscriminator] | None,
        teacher: Teacher | None,
        streams: Sequence[StreamSpec],
    ) -> None:
        """Take the parts; the recipe gives weights and switches.

        Args:
            recipe: asks for adversarial training or self-training only if their parts are given.
            segmenter: what is trained and shipped.
            discriminators: of source style and target style; None without adversarial training.
            teacher: labels target images; None without self-training.
            streams: source, and target unless the run is source-only.
        """
        super().__init__()
        self.recipe = recipe
        self.streams = tuple(streams)
        self.segmenter = segmenter
        self.disc_source: PatchDiscriminator | None = discriminators[0] if discriminators else None
        self.disc_target: PatchDiscriminator | None = discriminators[1] if discriminators else None
        self.teacher = teacher
        for name in ("source", "target"):
            weights = getattr(recipe, f"{name}_decoder_weights")
            tensor = None if weights is None else torch.tensor(weights)
            self.register_buffer(f"class_weights_{name}", tensor, persistent=False)

    def training_step(self, batch: Batch, step: int) -> StepOutput:  # noqa: ARG002 - the interface's
        """Losses of one micro-step on the streams `source` and `target`; the same in every step."""
        return self.losses_of(self.passes(batch), batch)

    def passes(self, batch: Batch) -> Passes:
        """Students on both domains, then the teacher, then the students on whatever else they learn from."""
        source, target = batch["source"], batch.get("target")
        if target is None or not self.recipe.students_see_target:
            (view,), target_view = self.segmenter.styles(source.images), None
        else:
            view, target_view = self.segmenter.styles(source.images, target.images)
        logits = self._decode(view)
        lessons = () if target is None else self._lessons(source, target, target_view)
        return Passes(view, logits, target_view, lessons)

    def losses_of(self, passes: Passes, batch: Batch) -> StepOutput:
        """Weighted losses, which the trainer adds up. Logged are each decoder's cross-entropies before their weights,
        the discriminators' losses, and the part of confident pixels.
        """
        source, target = batch["source"], batch.get("target")
        if source.masks is None:
            raise ValueError("the source stream has no masks; its StreamSpec must ask for them")
        seg = self._cross_entropies(passes.logits, source.masks)
        losses = {"seg": seg[0] + seg[1]}
        logs = {"seg_source": seg[0].detach(), "seg_target": seg[1].detach()}
        for lesson in passes.lessons:
            taught = self._cross_entropies(lesson.logits, lesson.pseudo.labels, lesson.pseudo.weights)
            losses[lesson.name] = lesson.weight * (taught[0] + taught[1])
            logs |= {f"{lesson.name}_source": taught[0].detach(), f"{lesson.name}_target": taught[1].detach()}
            logs["pseudo_ratio"] = lesson.pseudo.ratio
        if target is not None and passes.target is not None and self.recipe.adversarial is not None:
            sizes = (source.images.shape[-2:], target.images.shape[-2:])
            alignments = {
                "source": Alignment(passes.source.source[-1], passes.target.source[-1], *sizes),
                "target": Alignment(passes.target.target[-1], passes.source.target[-1], *reversed(sizes)),
            }
            for style, alignment in alignments.items():
                discriminator = self.get_submodule(f"disc_{style}")
                terms = adversarial_terms(discriminator, alignment, self.recipe.adversarial)
                losses |= {f"adv_{style}": terms.align, f"disc_{style}": terms.real + terms.fake}
                logs |= {f"disc_{style}_real": terms.real.detach(), f"disc_{style}_fake": terms.fake.detach()}
        return StepOutput(losses, logs)

    def param_groups(self) -> Mapping[str, Sequence[ParamGroup]]:
        """`main` trains students, neck and decoders; each discriminator has an optimizer of its own."""
        net = self.segmenter
        decayed, exempt = split_norms((net.backbone_source, net.backbone_target), self.recipe.weight_decay_exempt)
        neck = [] if net.neck is None else list(net.neck.parameters())
        decoders = [*net.decoder_source.parameters(), *net.decoder_target.parameters()]
        groups = {
            "main": [
                ParamGroup(decayed),
                ParamGroup(exempt, weight_decay=0.0),
                ParamGroup(neck),
                ParamGroup(decoders, lr_scale=self.recipe.head_lr_scale),
            ]
        }
        groups["main"] = [group for group in groups["main"] if group.params]
        for style, discriminator in (("source", self.disc_source), ("target", self.disc_target)):
            if discriminator is not None:
                groups[f"disc_{style}"] = [ParamGroup(list(discriminator.parameters()))]
        return groups

    def deployable(self) -> DASegNet:
        """Students, neck and decoders."""
        return self.segmenter

    def after_optimizer_step(self, step: int) -> None:
        """Move the teacher."""
        if self.teacher is not None:
            self.teacher.update(self.segmenter, step)

    def _lessons(self, source: Samples, target: Samples, view: Styles | None) -> tuple[Lesson, ...]:
        """What the students are to learn from target images; `view` is what they make of them as they are."""
        config = self.recipe.self_training
        if config is None or self.teacher is None:
            return ()
        # the students' own pass comes first: a teacher that uses their decoders moves their running statistics too
        same = self._decode(view) if view is not None and config.learns_from_teachers_image else None
        logits = self.teacher(self.segmenter, target.images, view)
        pseudo = pseudo_labels(logits, target.images.shape[-2:], target.valid, config)
        if same is not None:
            lessons = [Lesson("pseudo", config.weight, same, pseudo)]
        else:
            images, mixed = _harder(source, target, pseudo, config)
            lessons = [Lesson("pseudo", config.weight, self._decode(*self.segmenter.styles(images)), mixed)]
        if config.masked is not None:
            masked = config.masked
            images = hide_patches(target.images, self.segmenter.fill, patch=masked.patch, ratio=masked.ratio)
            seen = self._decode(*self.segmenter.styles(images))
            lessons.append(Lesson("masked", config.weight * masked.weight, seen, pseudo))
        return tuple(lessons)

    def _decode(self, view: Styles) -> Logits:
        return Logits(
            self.segmenter.decoder_source(view.refined_source), self.segmenter.decoder_target(view.refined_target)
        )

    def _cross_entropies(self, logits: Logits, labels: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
        source, target = (
            cross_entropy(maps, labels, class_weights=by_class, pixel_weights=weights, divisor=self.recipe.loss_divisor)
            for maps, by_class in (
                (logits.source, self.class_weights_source),
                (logits.target, self.class_weights_target),
            )
        )
        return source, target


def split_norms(
    backbones: Sequence[nn.Module], rule: Literal["names_with_norm", "norms", "none"]
) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Trainable parameters with and without weight decay, by `DASegNetRecipe.weight_decay_exempt`."""
    decayed: list[nn.Parameter] = []
    exempt: list[nn.Parameter] = []
    for backbone in backbones:
        for name, module in backbone.named_modules():
            match rule:
                case "names_with_norm":  # the published code names the last norm of a stage otherwise
                    free = isinstance(module, nn.LayerNorm) and re.search(r"stages\.\d+\.norm$", name) is None
                case "norms":
                    free = isinstance(module, nn.LayerNorm | nn.GroupNorm | _BatchNorm)
                case "none":
                    free = False
            parameters = [p for p in module.parameters(recurse=False) if p.requires_grad]
            (exempt if free else decayed).extend(parameters)
    return decayed, exempt


def _harder(
    source: Samples, target: Samples, pseudo: PseudoLabels, config: SelfTrainingConfig
) -> tuple[Tensor, PseudoLabels]:
    """Target images (B, C, H, W) with other colours and pasted source classes, and the labels that go with them."""
    images = target.images if config.student_view == "same" or target.strong is None else target.strong[:, 0]
    if not config.class_mix or source.masks is None:
        return images, pseudo
    partner = torch.arange(len(images), device=images.device) % len(source.images)
    pasted = class_mix(source.masks)[partner]
    return torch.where(pasted[:, None], source.images[partner], images), PseudoLabels(
        torch.where(pasted, source.masks[partner], pseudo.labels),
        torch.where(pasted, 1.0, pseudo.weights),
        pseudo.ratio,
    )
