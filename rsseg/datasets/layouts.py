"""Match images with masks and splits in a publisher's folder.

A pattern is a path relative to the dataset's folder. `{split}` and `{domain}` match one part of a file or folder name,
and so does `{group}` (images that must stay in one split). `*` and `?` match within a name, `**` any folders. An image
and a mask belong together if their common placeholders and the text matched by their wildcards agree; `{stem}` is
another name for the `*` of the file name. The extension matches in upper and lower case. `{any}` (folders) and `{text}`
(within a name) match and are not compared; `{id}` is compared only between the bands of an image. Patterns joined by
`|` are these bands.
"""

import filecmp
import os
import re
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple
from unicodedata import normalize

from rsseg.data.index import IndexItem
from rsseg.datasets.splits import check_shares, draw
from rsseg.errors import DataError, UsageError

_TOKEN = re.compile(r"\{(\w+)\}|\*\*/|\*|\?|[^*?{]+|.")
_EXTENSION = re.compile(r"\.\w+$")
_PLACEHOLDERS = ("split", "domain", "group", "stem", "part", "id")
_FREE = {"any": "(?:[^/]+/)*", "text": "[^/]*"}
"""Placeholders that are not compared."""
SIDECARS = (".aux.xml", ".msk", ".ovr")
"""Suffixes of files that GDAL reads with an image; they follow its name."""
WORLD_FILES = (
    ".tfw", ".tifw", ".tiffw", ".jgw", ".jpgw", ".jpegw", ".pgw", ".pngw", ".j2w", ".jp2w", ".bpw", ".wld", ".hdr",
    ".prj",
)  # fmt: skip
"""Suffixes of such files that replace the image's, in lower case."""
_IMAGES = ("tif", "tiff", "TIF", "TIFF", "png", "PNG", "jpg", "jpeg", "JPG", "JPEG", "jp2", "bmp", "img", "dat")
_DEPTH = 4
"""Maximum number of enclosing folders that an archive adds to a dataset."""

Key = tuple[tuple[str, str], ...]
"""Placeholder values of a path, sorted by placeholder; `stem` is all that the wildcards matched."""


class PathPattern:
    """One pattern, such as `{split}/images/*.jpg`."""

    def __init__(self, text: str) -> None:
        """Compile; raises `UsageError` for an unknown placeholder."""
        self.text = text.strip().removeprefix("./")
        named: set[str] = set()
        ending = _EXTENSION.search(self.text)
        body = self.text.removesuffix(ending[0]) if ending else self.text
        parts = [self._part(match, named) for match in _TOKEN.finditer(body)]
        self._regex = re.compile("".join(parts) + (f"(?i:{re.escape(ending[0])})" if ending else ""))
        self.placeholders = frozenset(named - {"stem"})

    def _part(self, match: re.Match[str], named: set[str]) -> str:
        token, name = match.group(0), match.group(1)
        if name in _FREE:
            return _FREE[name]
        if name is not None:
            if name not in _PLACEHOLDERS:
                known = ", ".join(f"{{{p}}}" for p in (*_PLACEHOLDERS, *_FREE))
                raise UsageError(f"pattern {self.text!r}: unknown placeholder {{{name}}}; known are {known}.")
            if name in named:
                return f"(?P={name})"
            named.add(name)
            return f"(?P<{name}>[^/]+)"
        wildcards = {"**/": "((?:[^/]+/)*)", "*": "([^/]*)", "?": "([^/])"}
        return wildcards.get(token) or re.escape(token)

    def prefixes(self, paths: Iterable[str]) -> set[str]:
        """Folders below which some path matches: "" or paths that end with "/"."""
        found = set()
        for path in paths:
            parts = path.split("/")
            for i in range(min(len(parts), _DEPTH + 1)):
                if self._regex.fullmatch("/".join(parts[i:])):
                    found.add("".join(f"{part}/" for part in parts[:i]))
        return found

    def match(self, path: str) -> dict[str, str] | None:
        """Placeholder values of a relative path with `/`, or None."""
        found = self._regex.fullmatch(path)
        if found is None:
            return None
        values = {name: normalize("NFC", value) for name, value in found.groupdict().items() if name != "stem"}
        numbers = {index for name, index in self._regex.groupindex.items() if name != "stem"}
        matched = [text for index, text in enumerate(found.groups(), start=1) if index not in numbers]
        return values | {"stem": normalize("NFC", "*".join(matched))}


class Located(NamedTuple):
    """An image without a split yet: relative paths with `/`, and placeholder values."""

    images: tuple[str, ...]
    mask: str | None
    values: Mapping[str, str]

    @property
    def group(self) -> str:
        """Name of the group, whose images must stay in one split."""
        return self.values.get("group") or self.images[0]


@dataclass(frozen=True)
class Layout:
    """Where the images and masks of a dataset are, and how they are split."""

    images: str
    """Pattern, or one pattern per band joined by `|`."""
    masks: str | None = None
    """Pattern; None without masks."""
    unlabeled: tuple[str, ...] = ()
    """Splits whose masks are never opened, even if there are any."""
    split_as: Mapping[str, str] = field(default_factory=dict)
    """Match of `{split}` -> `SPLIT` or `SPLIT:DOMAIN`; other matches are used as they are."""
    split_lists: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """`SPLIT` or `SPLIT:DOMAIN` -> image paths, names or stems; unlisted images are left out."""
    split_ratio: Mapping[str, float] = field(default_factory=dict)
    """Split -> share of the images (or groups), drawn with `seed`."""
    seed: int = 0
    domain_as: Mapping[str, str] = field(default_factory=dict)
    """Match of `{domain}` -> name; other matches are used as they are."""
    one_split: str | None = None
    """Split of all images, to be redistributed by a rule."""
    exclude: tuple[str, ...] = ()
    """Patterns of files to exclude from images and masks."""
    beside: tuple[str, ...] = ()
    """Patterns of further files to extract from archives."""
    check_names: bool = False
    """Raise for a key of `split_as` and a split of `unlabeled` that do not occur."""
    masks_later: bool = False
    """Masks are made after the files are found, as from vector labels."""
    subset: bool = False
    """Leave out masks without an image and images without a mask; otherwise they are errors."""

    def patterns(self) -> tuple[PathPattern, ...]:
        """Patterns of all bands and of the masks."""
        return tuple(PathPattern(text) for text in (*self.images.split("|"), *([self.masks] if self.masks else [])))

    def items(self, root: Path) -> tuple[IndexItem, ...]:
        """The images below `root`; see `items_of`."""
        return self.items_of({name: root / name for name in list_files(root)})

    def items_of(self, files: Mapping[str, Path]) -> tuple[IndexItem, ...]:
        """The images among files, sorted by path, with masks and splits.

        Args:
            files: path relative to the dataset's folder, with `/` -> file.

        Raises:
            DataError: no match, an image without a mask, a mask without an image, two different files for one image, a
                list that names an unknown image.
            UsageError: patterns and options that contradict each other.
        """
        located = self._pair(files)
        items = tuple(self._with_splits(located))
        if self.check_names:
            found = {one.values["split"] for one in located if "split" in one.values}
            _check_known("--split-as", self.split_as, found)
            _check_known("--unlabeled", self.unlabeled, {item.split for item in items})
        return self._check_masks(items, located)

    def _pair(self, files: Mapping[str, Path]) -> tuple[Located, ...]:
        excluded = [PathPattern(text) for text in self.exclude]
        files = {
            name: path
            for name, path in sorted(files.items())
            if not is_side_file(name, files) and not any(pattern.match(name) for pattern in excluded)
        }
        patterns = [PathPattern(text) for text in self.images.split("|")]
        masks = PathPattern(self.masks) if self.masks else None
        common = patterns[0].placeholders & masks.placeholders if masks else frozenset()
        bands = [_by_key(pattern, files) for pattern in patterns]
        both = _masks_among(bands[0], masks, common) if masks else set()
        if both:
            bands = [_by_key(pattern, {n: p for n, p in files.items() if n not in both}) for pattern in patterns]
        if not bands[0]:
            raise DataError(f"no image matches {patterns[0].text!r} among {len(files)} files{_examples(list(files))}.")
        others = {n: p for n, p in files.items() if n in both or not any(pattern.match(n) for pattern in patterns)}
        mask_of = _by_key(masks, others, only=common) if masks else {}
        alone = dict(mask_of)
        located = []
        for key, first in sorted(bands[0].items(), key=lambda entry: entry[1]):
            missing = [pattern.text for pattern, band in zip(patterns, bands, strict=True) if key not in band]
            if missing:
                raise DataError(f"{first}: no file of this image matches {missing[0]!r}, so a band is missing.")
            # several images may share a mask: dates of one place
            mask = mask_of.get(_restricted(key, common))
            alone.pop(_restricted(key, common), None)
            located.append(Located(tuple(band[key] for band in bands), mask, dict(key)))
        if alone and not self.split_lists and not self.subset:
            raise DataError(
                f"{len(alone)} mask(s) have no image, the first is {min(alone.values())}. "
                "Add the images, make the mask pattern narrower, or pass --subset to leave these masks out."
            )
        return tuple(located)

    def _with_splits(self, located: Sequence[Located]) -> Iterator[IndexItem]:
        if self.one_split is not None:
            yield from (_item(one, self.one_split, self.domain_as) for one in located)
        elif self.split_lists and self.split_ratio:
            raise UsageError("--split-list and --split-ratio exclude each other.")
        elif self.split_lists:
            yield from sorted(self._listed(located), key=lambda item: item.image)
        elif self.split_ratio:
            check_shares("--split-ratio", self.split_ratio)
            # with a split of its own for images without masks, only the labeled ones are drawn
            rest = next((split for split in self.unlabeled if split not in self.split_ratio), None)
            drawn = draw(sorted({one.group for one in located if one.mask or not rest}), self.split_ratio, self.seed)
            for one in located:
                yield _item(one, drawn[one.group] if one.mask or not rest else rest, self.domain_as)
        elif "split" in located[0].values:
            for one in located:
                folder = one.values["split"]
                yield _item(one, self.split_as.get(folder, folder), self.domain_as)
        else:
            raise UsageError(
                "the splits are unknown: write {split} into the patterns, "
                "or give --split-list train=FILE or --split-ratio train=0.8,val=0.1,test=0.1."
            )

    def _listed(self, located: Sequence[Located]) -> Iterator[IndexItem]:
        names: dict[str, list[Located]] = {}
        for one in located:
            path = Path(one.images[0])
            forms = (one.images[0], path.with_suffix("").as_posix(), path.name, path.stem, one.values["stem"])
            for name in {normalize("NFC", form) for form in forms}:
                names.setdefault(name, []).append(one)
        taken: dict[str, str] = {}
        for target, lines in self.split_lists.items():
            for line in lines:
                name = normalize("NFC", line.removeprefix("./"))
                found = names.get(name, []) or names.get(name.replace("\\", "/"), [])
                if len(found) != 1:
                    kind = "is not the name of an image" if not found else f"is the name of {len(found)} images"
                    raise DataError(f"split list {target}: {line!r} {kind}. List paths relative to the source folder.")
                image = found[0].images[0]
                if taken.get(image, target) != target:
                    raise DataError(
                        f"{image} is listed in {taken[image]} and in {target}; splits must not share images."
                    )
                if image not in taken:
                    yield _item(found[0], target, self.domain_as)
                taken[image] = target

    def _check_masks(self, items: tuple[IndexItem, ...], located: Sequence[Located]) -> tuple[IndexItem, ...]:
        hidden = tuple(
            item.model_copy(update={"mask": None}) if item.split in self.unlabeled else item for item in items
        )
        lost = [item for item in hidden if item.mask is None and item.split not in self.unlabeled]
        if self.subset and self.masks and len(lost) < len(hidden):
            return tuple(item for item in hidden if item not in lost)
        if lost and not self.masks_later:
            name, split = lost[0].image, lost[0].split
            remedy = (
                "Add the masks, pass --unlabeled SPLIT for a split without masks, or --subset to omit these images."
            )
            if self.masks and PathPattern(self.masks).match(name):
                remedy = "The mask pattern also matches it: make the image pattern narrower, or add its image."
            raise DataError(
                f"{len(lost)} of {len(located)} images have no mask, the first is {name} (split {split}). {remedy}"
            )
        return hidden


def find_prefix(files: Mapping[str, Path], layouts: Sequence[Layout], where: str) -> tuple[Layout, str]:
    """The first layout that fits, and the folder below which it fits: "" or a path that ends with "/".

    Raises `DataError` naming `where` if none does, or if two folders of the same depth hold different files for it.
    """
    for layout in layouts:
        patterns = layout.patterns()
        prefixes = set.intersection(*(pattern.prefixes(files) for pattern in patterns))
        if not prefixes:
            continue
        first, *others = sorted(prefixes, key=lambda prefix: (prefix.count("/"), prefix))
        for other in others:
            if other.count("/") == first.count("/"):
                _check_copy(files, patterns, first, other)
        return layout, first
    # patterns that the closest layout does not find
    nearest = max(layouts, key=lambda layout: sum(bool(pattern.prefixes(files)) for pattern in layout.patterns()))
    missing = [pattern.text for pattern in nearest.patterns() if not pattern.prefixes(files)] or [nearest.images]
    raise DataError(f"{where}: no file matches {' or '.join(map(repr, missing))}{_examples(list(files))}.")


def _check_copy(files: Mapping[str, Path], patterns: Sequence[PathPattern], first: str, other: str) -> None:
    """Raise `DataError` unless each file of the dataset below `other` is a copy of the one below `first`."""
    for name, path in files.items():
        rest = name.removeprefix(other)
        if name == rest or not any(pattern.match(rest) for pattern in patterns):
            continue
        if f"{first}{rest}" not in files or not same_content(files[f"{first}{rest}"], path):
            raise DataError(f"{first} and {other} both look like the dataset, and {rest} differs. Pass one as --src.")


def list_files(root: Path) -> Iterator[str]:
    """Files below a folder, as sorted relative paths with `/`; links are followed, hidden files and folders left out.

    Raises `DataError` for a folder that cannot be read.
    """
    found = []
    folders = [("", frozenset((os.path.realpath(root),)))]
    while folders:
        prefix, above = folders.pop()
        try:
            entries = [entry for entry in os.scandir(root / prefix) if not entry.name.startswith(".")]
        except OSError as error:
            raise DataError(f"{root / prefix}: the folder cannot be read ({error.strerror}).") from None
        found += [f"{prefix}{entry.name}" for entry in entries if entry.is_file()]
        for entry in entries:
            # a link to a folder that contains it would recurse forever
            if entry.is_dir() and (real := os.path.realpath(entry.path)) not in above:
                folders.append((f"{prefix}{entry.name}/", above | {real}))
    yield from sorted(found)


def is_side_file(name: str, files: Container[str]) -> bool:
    """Whether GDAL reads a file together with an image among `files`: statistics, masks, overviews, world files."""
    stem, dot, suffix = name.rpartition(".")
    if f"{dot}{suffix}".lower() in WORLD_FILES:
        return any(f"{stem}.{image}" in files for image in _IMAGES)
    return any(name.removesuffix(side) in files for side in SIDECARS if name.endswith(side))


def _item(one: Located, target: str, domain_as: Mapping[str, str]) -> IndexItem:
    split, _, domain = target.partition(":")
    for path in one.images:
        if "|" in path:
            raise DataError(f"{path}: a file name must not contain '|'. Rename it.")
    found = one.values.get("domain")
    return IndexItem(
        image="|".join(one.images),
        mask=one.mask,
        split=split,
        domain=domain or domain_as.get(found or "", found) or None,
        scene=one.values.get("group"),
    )


def _by_key(pattern: PathPattern, files: Mapping[str, Path], only: frozenset[str] | None = None) -> dict[Key, str]:
    """Files that match, by placeholder values (only those in `only` and the stem, if given); copies are left out."""
    found: dict[Key, str] = {}
    for name, path in files.items():
        values = pattern.match(name)
        if values is None:
            continue
        key: Key = tuple(sorted(values.items()))
        key = key if only is None else _restricted(key, only)
        other = found.setdefault(key, name)
        if other != name and not same_content(files[other], path):
            raise DataError(
                f"{other} and {name} differ, but look the same to the pattern {pattern.text!r}. Keep one of them."
            )
    return found


def same_content(one: Path, other: Path) -> bool:
    """Whether two files hold the same bytes."""
    return filecmp.cmp(one, other, shallow=False)


def _masks_among(images: Mapping[Key, str], masks: PathPattern, common: frozenset[str]) -> set[str]:
    """Files that match both patterns, but are the mask of another image: `a_mask.png` beside `a.png`."""
    owners: dict[Key, set[str]] = {}
    for key, name in images.items():
        owners.setdefault(_restricted(key, common), set()).add(name)
    found = set()
    for name in images.values():
        values = masks.match(name)
        if values is not None and owners.get(_restricted(tuple(sorted(values.items())), common), set()) - {name}:
            found.add(name)
    return found


def _restricted(key: Key, names: frozenset[str]) -> Key:
    return tuple((name, value) for name, value in key if name in names or name == "stem")


def _check_known(option: str, given: Iterable[str], found: set[str]) -> None:
    if unknown := [name for name in given if name not in found]:
        known = ", ".join(sorted(found)) or "none: the patterns have no {split}"
        raise UsageError(f"{option} {unknown[0]}: there is no such split; found are {known}.")


def _examples(files: Sequence[str]) -> str:
    return f", such as {', '.join(files[:3])}" if files else " (the folder is empty)"
