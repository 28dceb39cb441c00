"""Download archives from the Hugging Face hub or from their publisher, with the user's consent only."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from rsseg.datasets.card import DatasetCard, WebSource
from rsseg.datasets.prepare.archives import md5_of
from rsseg.errors import DataError, MachineError, UsageError

Progress = Callable[[str, int, int], None]
_DISK_FULL = (28, 122)


def fetch(card: DatasetCard, folder: Path, *, download: bool, offline: bool, progress: Progress) -> Path:
    """The card's archive in the hub's cache, or the folder with its archives from the web; downloaded if missing.

    Args:
        card: a dataset with archives on the hub or the web.
        folder: archives from the web go to `NAME-download` below it.
        download: the user agreed to the download.
        offline: take it from the cache or fail.
        progress: called with name, size and licence before the download starts, then with megabytes.

    Raises:
        DataError: no consent, no network, or no such archive.
        MachineError: the disk is full.
    """
    if card.web:
        return fetch_web(card, folder / f"{card.name}-download", download=download, offline=offline, progress=progress)
    hub = card.hub
    if hub is None:
        raise UsageError(f"{card.name}: rsseg cannot download this dataset. Get it from its publisher and pass --src.")
    what = f"{hub.file} ({card.size}, licence {card.license}) from huggingface.co/datasets/{hub.repo}"
    by_hand = f"or get the file yourself and pass it with --src {hub.file}"
    if not download:
        raise DataError(f"{card.name}: not here yet. Pass --download to fetch {what}, {by_hand}.")

    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    progress(f"fetch {what}", 0, 1)
    bar = _bar(f"fetch {hub.file} (MB)", progress)
    try:
        path = hf_hub_download(hub.repo, hub.file, repo_type="dataset", local_files_only=offline, tqdm_class=bar)
    except LocalEntryNotFoundError:
        reason = "rsseg is offline" if offline else "the hub cannot be reached"
        raise DataError(f"{card.name}: {reason}. Try again with a network, {by_hand}.") from None
    except _failures() as error:
        raise _failure(card, what, error, by_hand) from None
    return Path(path)


def fetch_web(card: DatasetCard, folder: Path, *, download: bool, offline: bool, progress: Progress) -> Path:
    """The folder with the card's archives; missing ones are downloaded, partial ones resumed.

    Raises:
        DataError: no consent, no network, or a file that does not have its publisher's checksum.
        MachineError: the disk is full.
    """
    missing = [web for web in card.web if not (folder / web.file).is_file()]
    if not missing:
        return folder
    names = ", ".join(web.file for web in card.web)
    what = f"{names} (licence {card.license}) from {card.download_url()}"
    by_hand = "or get the files yourself and pass their folder with --src"
    if not download:
        raise DataError(f"{card.name}: not here yet. Pass --download to fetch {what}, {by_hand}.")
    if offline:
        raise DataError(f"{card.name}: rsseg is offline. Try again with a network, {by_hand}.")
    progress(f"fetch {what}", 0, 1)
    for web in missing:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _fetch_file(web, folder, progress)
        except _failures() as error:
            raise _failure(card, web.file, error, by_hand) from None
    return folder


def _fetch_file(web: WebSource, folder: Path, progress: Progress) -> None:
    """Download a file under a temporary name, check it, rename it; a partial file is resumed, never deleted."""
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.file_download import http_get

    partial = folder / f"{web.file}.partial"
    bar = _bar(f"fetch {web.file} (MB)", progress)
    with partial.open("ab") as file:
        try:
            http_get(web.url, file, resume_size=file.tell(), displayed_filename=web.file, tqdm_class=bar)
        except HfHubHTTPError as error:
            # The file is complete: an earlier call was stopped before the check.
            if error.response.status_code != 416:
                raise
    found = md5_of(partial)
    if found != web.md5:
        partial.unlink()
        raise DataError(f"{web.url}: the file has the MD5 {found}, its publisher states {web.md5}. Try again.")
    partial.replace(folder / web.file)


def _failures() -> tuple[type[Exception], ...]:
    from huggingface_hub.errors import HfHubHTTPError

    # its first base is the HTTP client's own error, which is raised where no answer came
    return HfHubHTTPError.__mro__[1], OSError


def _failure(card: DatasetCard, what: str, error: Exception, by_hand: str) -> DataError | MachineError:
    if isinstance(error, OSError) and error.errno in _DISK_FULL:
        return MachineError(f"{card.name}: the disk is full. Free some space and repeat the command to resume.")
    return DataError(f"{card.name}: fetching {what} failed: {error}. Repeat the command to resume, {by_hand}.")


def _bar(title: str, progress: Progress) -> type[tqdm]:  # type: ignore[type-arg]
    """A tqdm class that prints nothing and reports megabytes to `progress`."""

    class Bar(tqdm):  # type: ignore[type-arg]
        def __init__(self, *_: Any, total: float | None = None, initial: float = 0, **__: Any) -> None:
            super().__init__(disable=True)
            self.total, self.n = total, initial

        def update(self, n: float | None = 1) -> bool | None:
            self.n += n or 0
            progress(title, int(self.n) >> 20, int(self.total or 0) >> 20)
            return None

    return Bar
