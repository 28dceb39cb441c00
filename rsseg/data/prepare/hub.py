"""Fetches an archive from the Hugging Face hub, with the user's consent only."""

from collections.abc import Callable
from pathlib import Path

from rsseg.data.cards import DatasetCard
from rsseg.errors import DataError


def fetch(card: DatasetCard, *, download: bool, offline: bool, progress: Callable[[str, int, int], None]) -> Path:
    """The card's archive, from the hub's cache or over the network.

    Args:
        card: a dataset whose publisher has an archive on the hub.
        download: the user agreed to fetch it.
        offline: take it from the cache or fail.
        progress: told what is fetched, how big it is and under which licence, before it starts.

    Raises:
        DataError: no consent, no network, or no such archive; the message says how to go on.
    """
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
