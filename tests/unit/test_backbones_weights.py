"""Where weights are looked for, and what is said if they are not there."""

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from rsseg.backbones.zoo import (
    HUB_FILE,
    ZOO,
    check_weights,
    is_cached,
    pull_weights,
    resolve_weights,
    verify_weights,
)
from rsseg.config import BackboneConfig
from rsseg.errors import WeightsError

RESNET = ZOO["resnet18"]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    return tmp_path


def put_into(cache: Path, content: dict[str, torch.Tensor]) -> Path:
    """The hub's cache layout: a blob named by its hash, and a snapshot that points to it."""
    assert RESNET.hub is not None
    folder = cache / f"models--{RESNET.hub.replace('/', '--')}"
    blobs, snapshot, refs = folder / "blobs", folder / "snapshots" / "0" / HUB_FILE, folder / "refs" / "main"
    for path in (blobs / "x", snapshot, refs):
        path.parent.mkdir(parents=True)
    save_file(content, blobs / "x")
    blob = blobs / hashlib.sha256((blobs / "x").read_bytes()).hexdigest()
    (blobs / "x").rename(blob)
    snapshot.symlink_to(blob)
    refs.write_text("0")
    return blob


def test_missing_weights_name_size_licence_and_both_ways_out(cache: Path) -> None:
    assert not is_cached(RESNET)
    with pytest.raises(WeightsError) as caught:
        check_weights(BackboneConfig(name="resnet18"))
    assert caught.value.exit_code == 5
    for part in ("rsseg weights pull resnet18", "weights: FILE", "about 47 MB", "apache-2.0"):
        assert part in str(caught.value)


def test_cached_weights_are_found_hashed_and_verified(cache: Path) -> None:
    blob = put_into(cache, {"a": torch.ones(3)})
    assert is_cached(RESNET)
    found = check_weights(BackboneConfig(name="resnet18"))
    assert found == resolve_weights(RESNET)
    assert (found.license, found.source, found.sha256) == ("apache-2.0", RESNET.hub, blob.name)
    assert verify_weights(RESNET) == found


def test_damaged_cache_is_noticed(cache: Path) -> None:
    with put_into(cache, {"a": torch.ones(3)}).open("ab") as blob:
        blob.write(b"\0")
    with pytest.raises(WeightsError, match="damaged"):
        verify_weights(RESNET)


def test_cached_weights_are_not_pulled_again(cache: Path) -> None:
    put_into(cache, {"a": torch.ones(3)})
    said: list[str] = []
    assert pull_weights(RESNET, announce=said.append).source == RESNET.hub
    assert said == []


def test_offline_forbids_the_download(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RSSEG_OFFLINE", "1")
    said: list[str] = []
    with pytest.raises(WeightsError, match="disabled"):
        pull_weights(RESNET, announce=said.append)
    assert said == []


def test_download_is_announced_before_anything_is_fetched(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RSSEG_OFFLINE", raising=False)

    def stop(message: str) -> None:
        raise KeyboardInterrupt(message)

    with pytest.raises(KeyboardInterrupt, match=r"timm/resnet18.*about 47 MB, licence apache-2\.0"):
        pull_weights(RESNET, announce=stop)
    assert not list(cache.iterdir())


def test_random_weights_need_no_file() -> None:
    assert check_weights(BackboneConfig(name="resnet18", weights="random")) is None


def test_network_without_weights_says_what_to_write() -> None:
    with pytest.raises(WeightsError, match="weights: random"):
        check_weights(BackboneConfig(name="convnext_mini"))


@pytest.mark.parametrize("name", ["absent.safetensors", "pretraned", "a" * 300])
def test_missing_file_is_named(name: str) -> None:
    with pytest.raises(WeightsError, match=f"no weights file {name[:200]}"):
        check_weights(BackboneConfig(name="resnet18", weights=name))


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    (tmp_path / "w.pth").write_bytes(b"")
    with pytest.raises(WeightsError, match="rsseg weights import"):
        check_weights(BackboneConfig(name="resnet18", weights=str(tmp_path / "w.pth")))
