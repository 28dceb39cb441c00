import copy
import functools

import pytest
import timm
import torch
from timm.layers import Conv2dSame
from torch import Tensor, nn

from rsseg.inference.network import fold_convolutions, ready_to_predict, store_convolutions
from rsseg.methods.registry import segmenter_for
from rsseg.recipe import RecipeSource, parse_recipe
from tests.toys import ConvSegmenter, make_task

RECIPE = """
name: tiny
method: ktda
data: {{path: none}}
student: {{name: {student}, weights: random}}
decoder: {{type: {decoder}, channels: 16}}
"""


def trained(network: nn.Module) -> nn.Module:
    """Norms that do something, as after training."""
    torch.manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.5, 0.5)
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    return network.eval()


def count(network: nn.Module, kind: type[nn.Module]) -> int:
    return sum(isinstance(module, kind) for module in network.modules())


@pytest.mark.parametrize("decoder", ["segformer", "upernet"])
@pytest.mark.parametrize("student", ["tf_efficientnet_lite0", "resnet_mini"])
def test_ready_network_has_less_to_do_and_the_same_logits(student: str, decoder: str) -> None:
    recipe = parse_recipe(RecipeSource("tiny", RECIPE.format(student=student, decoder=decoder)))
    segmenter = trained(segmenter_for(recipe, make_task()))
    before = copy.deepcopy(segmenter.state_dict())
    ready, _ = ready_to_predict(segmenter, torch.device("cpu"), torch.float32)
    images = torch.rand(2, 3, 96, 64)
    with torch.inference_mode():
        torch.testing.assert_close(ready.predict_logits(images), segmenter.predict_logits(images), rtol=1e-3, atol=1e-4)
    assert count(segmenter, nn.BatchNorm2d) > 10 * count(ready, nn.BatchNorm2d)
    assert count(ready, Conv2dSame) == 0
    for name, tensor in segmenter.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize(("kernel", "stride"), [(1, 2), (3, 2), (5, 2), (4, 2), (3, 1), (5, 4)])
def test_uneven_padding_becomes_even_with_the_same_output(kernel: int, stride: int) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(Conv2dSame(4, 4, kernel, stride, groups=2)).eval()
    images = torch.rand(1, 4, 16, 32)
    with torch.no_grad():
        expected = network(images)
        fold_convolutions(network, functools.partial(network, images))
        torch.testing.assert_close(network(images), expected)
    assert type(network[0]) is nn.Conv2d


class ReadTwice(nn.Module):
    """What the convolution returns is used beside the norm as well."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.conv(images)
        return self.norm(maps) + maps


class SharedConv(nn.Module):
    """One convolution, two norms."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norms = nn.Conv2d(3, 3, 1), nn.ModuleList(nn.BatchNorm2d(3) for _ in range(2))

    def forward(self, images: Tensor) -> Tensor:
        return self.norms[0](self.conv(images)) + self.norms[1](self.conv(images + 1))


@pytest.mark.parametrize("make", [ReadTwice, SharedConv])
def test_network_that_cannot_be_folded_stays_as_it_was(make: type[nn.Module]) -> None:
    network = trained(make())
    images = torch.rand(1, 3, 8, 8)
    with torch.no_grad():
        expected = network(images)
        fold_convolutions(network, functools.partial(network, images))
        assert torch.equal(network(images), expected)
    assert count(network, nn.BatchNorm2d) == count(make(), nn.BatchNorm2d)


def test_activation_inside_a_norm_stays() -> None:
    network = trained(timm.create_model("mobilenetv3_small_050", num_classes=3))
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        expected = network(images)
        fold_convolutions(network, functools.partial(network, images))
        torch.testing.assert_close(network(images), expected, rtol=1e-3, atol=1e-4)
    assert count(network, nn.BatchNorm2d) == 0


@torch.no_grad()
def test_convolutions_stored_in_half_precision_give_the_bits_of_autocast() -> None:
    network = trained(timm.create_model("resnet10t", num_classes=3))
    images = torch.rand(1, 3, 64, 64)
    with torch.autocast("cpu", torch.bfloat16):
        expected = network(images)
        store_convolutions(network, torch.bfloat16, lambda: True)
        assert torch.equal(network(images), expected)
    convs = [module for module in network.modules() if isinstance(module, nn.Conv2d)]
    assert {conv.weight.dtype for conv in convs} == {torch.bfloat16}


def test_convolutions_that_compute_in_full_precision_stay_so() -> None:
    class Network(ConvSegmenter):
        def forward(self, images: Tensor) -> Tensor:
            with torch.autocast("cpu", enabled=False):
                return super().forward(images.float())

    segmenter = Network(make_task())
    ready, dtype = ready_to_predict(segmenter, torch.device("cpu"), torch.bfloat16)
    assert dtype == torch.bfloat16
    assert all(parameter.dtype == torch.float32 for parameter in ready.parameters())
