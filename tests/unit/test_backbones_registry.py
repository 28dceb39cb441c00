"""Every network of the zoo, built and run without memory on the meta device."""

import subprocess
import sys

import pytest
import timm
import torch

from rsseg.backbones.backbone import create_backbone
from rsseg.backbones.zoo import ENTRIES, ZOO, ZooEntry
from rsseg.config import BackboneConfig
from tests.unit.backbone_tasks import task_of

SMALL = (
    "convnext_atto",
    "convnextv2_atto",
    "resnet18",
    "resnet50_v1c_d8",
    "efficientnet_b0",
    "tf_efficientnet_lite0",
    "mobilenetv3_small_100",
    "swin_tiny_patch4_window7_224",
    "mit_b0",
    "tiny_vit_5m_224",
    "convnext_mini",
    "vit_mini_patch8",
    "vit_small_patch14_reg4_dinov2",
    "vit_small_patch16_dinov3",
)


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_entry_builds_and_has_the_promised_maps(entry: ZooEntry) -> None:
    with torch.device("meta"), torch.no_grad():
        backbone = create_backbone(BackboneConfig(name=entry.name), task_of("red", "green", "blue"), load_weights=False)
        side = backbone.info.input_multiple
        maps = backbone(torch.rand(2, 3, 2 * side, 3 * side))
    info = backbone.info
    assert (info.strides, info.kind, info.patch_size) == (entry.strides, entry.kind, entry.patch_size)
    sizes = [(2, c, 2 * side // s, 3 * side // s) for c, s in zip(info.channels, info.strides, strict=True)]
    assert [tuple(tap.shape) for tap in maps] == sizes


@pytest.mark.parametrize("entry", [entry for entry in ENTRIES if entry.hub], ids=lambda entry: entry.name)
def test_entry_names_its_weights_as_timm_does(entry: ZooEntry) -> None:
    known = timm.models.get_pretrained_cfg(entry.timm_name)
    hub = known.hf_hub_id if known.hf_hub_id != "timm/" else f"timm/{entry.timm_name}"
    assert (hub, known.license) == (entry.hub, entry.license)


@pytest.mark.parametrize("name", [name for name in SMALL if ZOO[name].hub])
def test_entry_states_the_size_of_the_complete_network(name: str) -> None:
    entry = ZOO[name]
    with torch.device("meta"):
        network = timm.create_model(entry.timm_name)
    assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(entry.millions, abs=0.06)
    assert entry.final_norm is None or f"{entry.final_norm}.weight" in network.state_dict()


@pytest.mark.parametrize("name", SMALL)
def test_small_network_takes_any_size_and_memory_format_and_trains_every_parameter(name: str) -> None:
    backbone = create_backbone(BackboneConfig(name=name), task_of("nir", "red"), load_weights=False).eval()
    images = torch.rand(1, 2, 75, 90)
    maps = backbone(images)
    again = backbone.to(memory_format=torch.channels_last)(images.contiguous(memory_format=torch.channels_last))
    for tap, other, channels in zip(maps, again, backbone.info.channels, strict=True):
        assert tap.shape[1] == channels
        assert torch.isfinite(tap).all()
        torch.testing.assert_close(tap, other, rtol=1e-3, atol=1e-4)
    torch.autograd.backward([tap.sum() for tap in again])
    assert [name for name, parameter in backbone.named_parameters() if parameter.grad is None] == []


def test_names_are_unique() -> None:
    assert len({entry.name for entry in ENTRIES}) == len(ENTRIES)


def test_listing_needs_neither_torch_nor_timm() -> None:
    code = (
        "import sys; from rsseg.backbones.zoo import ENTRIES; from rsseg.backbones.zoo import is_cached; "
        "[is_cached(e) for e in ENTRIES]; sys.exit(', '.join({'torch', 'timm'} & set(sys.modules)) or 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
