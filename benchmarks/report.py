"""Report of a run with many test images: seconds and size, beside a page of the same pictures made with PIL alone.

    python benchmarks/report.py [--images 500] [--rounds 3]

The run is real: the built-in dataset, its test images repeated under other names, a training of two steps, `rsseg eval`.
`report` is the command `rsseg report RUN`. `pictures` opens the pictures of the evaluation, encodes them again and writes
them into a page, without tables and charts. Each side is a process of its own, in turn; seconds are of the processor, with
imports. Exit code 1 above 10 s or 15 MB.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

LIMIT_SECONDS, LIMIT_MB = 10.0, 15.0
PICTURES = """
import base64, io, sys
from pathlib import Path
from PIL import Image
page = []
for file in sorted(Path(sys.argv[1]).iterdir()):
    buffer = io.BytesIO()
    Image.open(file).save(buffer, "JPEG" if file.suffix == ".jpg" else "PNG", optimize=True)
    page.append(f'<img src="data:image;base64,{base64.b64encode(buffer.getvalue()).decode()}">')
Path(sys.argv[2]).write_text("".join(page))
"""


def rsseg(*words: str) -> list[str]:
    return [sys.executable, "-m", "rsseg", *words]


def make_run(folder: Path, images: int) -> Path:
    """A run whose evaluation `test` has so many images."""
    from rsseg.data.index import SegmentationIndex

    data, runs = folder / "demo", folder / "runs"
    quiet = {"check": True, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    subprocess.run(rsseg("dataset", "prepare", "demo", "--out", str(data)), **quiet)
    train = ("train", "--recipe", "demo-supervised", "--data", str(data), "--output", str(runs))
    subprocess.run(rsseg(*train, "--set", "trainer.steps=2", "--set", "trainer.workers=0"), **quiet)
    file = next(data.glob("*index.json"))
    index = SegmentationIndex.load(file)
    test = [item for item in index.items if item.split == "test"]
    copies = []
    for number in range(images):
        item = test[number % len(test)]
        names = {}
        for kind in ("image", "mask"):
            old = Path(getattr(item, kind))
            names[kind] = str(old.with_name(f"copy{number}_{old.name}"))
            os.link(index.root / old, index.root / names[kind])
        copies.append(item.model_copy(update=names))
    kept = tuple(item for item in index.items if item.split != "test")
    index.model_copy(update={"items": (*kept, *copies)}).save(file)
    run = next(path for path in runs.iterdir() if not path.is_symlink())
    subprocess.run(rsseg("eval", "--model", str(run)), **quiet)
    return run


def seconds_of(command: list[str]) -> float:
    """Processor seconds of a command and its children."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run = make_run(folder, options.images)
        page, plain = run / "report.html", folder / "pictures.html"
        commands = {
            "report": rsseg("report", str(run)),
            "pictures": [sys.executable, "-c", PICTURES, str(run / "evaluations" / "test"), str(plain)],
        }
        seconds: dict[str, list[float]] = {kind: [] for kind in commands}
        for _ in range(options.rounds):
            for kind, command in commands.items():
                seconds[kind].append(seconds_of(command))
        sizes = {"report": page.stat().st_size / 1e6, "pictures": plain.stat().st_size / 1e6}
        rows = page.read_text(encoding="utf-8").count("copy")
    print(f"{options.images} test images ({rows} mentions in the page), median of {options.rounds}:")
    median = {kind: statistics.median(found) for kind, found in seconds.items()}
    for kind in commands:
        ratio = median[kind] / median["pictures"]
        print(f"  {kind:9} {median[kind]:6.2f} s  {ratio:5.2f}x the pictures alone  {sizes[kind]:5.2f} MB")
    return int(median["report"] > LIMIT_SECONDS or sizes["report"] > LIMIT_MB)


if __name__ == "__main__":
    sys.exit(main())
