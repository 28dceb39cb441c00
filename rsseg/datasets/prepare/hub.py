"""Download archives from the Hugging Face hub or from their publisher, with the user's consent only."""

import hashlib
import http.client
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

from rsseg.datasets.card import DatasetCard, WebSource
from rsseg.errors import DataError


def fetch(
    card: DatasetCard, folder: Path, *, download: bool, offline: bool, progress: Callable[[str, int, int], None]
) -> Path:
    """The card's archive in the hub's cache, or the folder with its archives from the web; downloaded if missing.

    Args:
        card: a dataset with archives on the hub or the web.
        folder: archives from the web go to `NAME-download` below it.
        download: the user agreed to the download.
        offline: take it from the cache or fail.
        progress: called with name, size and licence before the download starts.

    Raises:
        DataError: no consent, no network, or no such archive.
    """
    if card.web:
        return fetch_web(card, folder / f"{card.name}-download", download=download, offline=offline, progress=progress)
    hub = card.hub
    if hub is None:
        raise DataError(f"{card.name}: rsseg cannot download this dataset. Get it from its publisher and pass --src.")
    what = f"{hub.file} ({card.size}, licence {card.license}) from huggingface.co/datasets/{hub.repo}"
    by_hand = f"or get the file yourself and pass it with --src {hub.file}"
    if not download:
        raise DataError(f"{card.name}: not here yet. Pass --download to fetch {what}, {by_hand}.")

    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    progress(f"fetch {what}", 0, 1)
    try:
        path = hf_hub_download(hub.repo, hub.file, repo_type="dataset", local_files_only=offline)
    except LocalEntryNotFoundError:
        reason = "rsseg is offline" if offline else "the hub cannot be reached"
        raise DataError(f"{card.name}: {reason}. Try again with a network, {by_hand}.") from None
    except (HfHubHTTPError, OSError) as error:
        raise DataError(f"{card.name}: fetching {what} failed: {error}. Try again, {by_hand}.") from None
    progress(f"fetch {what}", 1, 1)
    return Path(path)


def fetch_web(
    card: DatasetCard, folder: Path, *, download: bool, offline: bool, progress: Callable[[str, int, int], None]
) -> Path:
    """The folder with the card's archives; missing ones are downloaded, partial ones resumed.

    Raises:
        DataError: no consent, no network, or a file that does not have its publisher's checksum.
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
    folder.mkdir(parents=True, exist_ok=True)
    for web in missing:
        try:
            _fetch_file(web, folder, progress)
        except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
            raise DataError(
                f"{card.name}: fetching {web.file} failed: {error}. Repeat the command to resume, {by_hand}."
            ) from None
    return folder


def _fetch_file(web: WebSource, folder: Path, progress: Callable[[str, int, int], None]) -> None:
    partial = folder / f"{web.file}.partial"
    begun = partial.stat().st_size if partial.exists() else 0
    request = urllib.request.Request(web.url, headers={"Range": f"bytes={begun}-"} if begun else {})
    with urllib.request.urlopen(request, timeout=60) as answer, partial.open("ab") as file:
        if answer.status != http.HTTPStatus.PARTIAL_CONTENT:
            # the whole file comes, whatever was asked for
            file.truncate(0)
            begun = 0
        total = begun + int(answer.headers.get("Content-Length") or 0)
        while block := answer.read(1 << 20):
            file.write(block)
            begun += len(block)
            progress(f"fetch {web.file} (MB)", begun >> 20, total >> 20)
    with partial.open("rb") as file:
        found = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    if found != web.md5:
        partial.unlink()
        raise DataError(f"{web.url}: the file has the MD5 {found}, its publisher says {web.md5}. Try again.")
    partial.replace(folder / web.file)
