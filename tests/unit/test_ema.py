import torch
from torch import nn

from rsseg.layers.ema import Ema


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3))


def test_average_follows_the_formula_and_counters_are_copied() -> None:
    source = network()
    ema = Ema(source, 0.9)
    before = {k: v.clone() for k, v in ema.module.state_dict().items()}
    with torch.no_grad():
        for tensor in source.state_dict().values():
            tensor.add_(3)
    ema.update(source)
    after, target = ema.module.state_dict(), source.state_dict()
    for name, tensor in before.items():
        if tensor.is_floating_point():
            torch.testing.assert_close(after[name], 0.9 * tensor + 0.1 * target[name])
        else:
            assert torch.equal(after[name], target[name])
    ema.update(source, decay=0.0)
    torch.testing.assert_close(ema.module.state_dict(), source.state_dict())


def test_buffers_can_be_copied() -> None:
    source = network()
    ema = Ema(source, 0.9, buffers="copy")
    source[1].running_mean.fill_(5)  # type: ignore[operator, union-attr]
    ema.update(source)
    assert torch.equal(ema.module[1].running_mean, source[1].running_mean)  # type: ignore[index]


def test_average_stays_in_eval_has_no_gradient_and_survives_a_move() -> None:
    source = network()
    owner = nn.ModuleList([Ema(source, 0.5)])
    ema = owner[0]
    assert isinstance(ema, Ema)
    ema.update(source)
    owner.train().double()
    source.double()
    ema.update(source, decay=0.0)
    assert not ema.module.training
    assert not any(p.requires_grad for p in ema.parameters())
    torch.testing.assert_close(ema.module.state_dict(), source.state_dict())


def test_module_without_buffers_or_parameters_can_be_averaged() -> None:
    for source in (nn.Linear(1, 1), nn.ReLU()):
        Ema(source, 0.9).update(source)
