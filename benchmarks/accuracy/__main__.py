"""Accuracy of every method beside plain training of the same network, as one command.

    python -m benchmarks.accuracy --quick
    python -m benchmarks.accuracy --profile cpu --data DATA --weights WEIGHTS --jobs 2 --hours 8
    python -m benchmarks.accuracy --setting dubai-10 --arm lite0-mtdf-recommended --data DATA --weights WEIGHTS

Writes docs/results.md with its table (CSV) and figures. Cells that are done are not run again.
`--setting`, `--arm` and `--seed`, also several, choose what is run. Arms that these need are run too; the page shows
all cells.
"""

import argparse
import os
from pathlib import Path

from benchmarks.accuracy.report import write_report
from benchmarks.accuracy.run import Table, run_table
from benchmarks.accuracy.table import PROFILES, SETTINGS

ARMS = {arm.name for setting in SETTINGS.values() for arm in setting.arms}
DOCS = Path(__file__).parents[2] / "docs"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy", description=__doc__.partition("\n")[0])
    parser.add_argument("--profile", choices=sorted(PROFILES), default="cpu")
    parser.add_argument("--quick", action="store_true", help="three tiny cells, to see that all works")
    parser.add_argument("--setting", action="append", default=[], choices=sorted(SETTINGS), help="run only this table")
    parser.add_argument("--arm", action="append", default=[], choices=sorted(ARMS), help="run only this arm")
    parser.add_argument("--seed", action="append", default=[], type=int, help="run only this seed")
    parser.add_argument("--data", type=Path, help="folder with dubai/ and l8biome_cloud/; or RSSEG_ACCURACY_DATA")
    parser.add_argument("--weights", type=Path, help="folder with NAME.safetensors; or RSSEG_ACCURACY_WEIGHTS")
    parser.add_argument("--output", type=Path, default=Path("accuracy-output"), help="cells and datasets")
    parser.add_argument("--docs", type=Path, help="folder for results.md; docs/, or the output with --quick")
    parser.add_argument("--jobs", type=int, default=1, help="processes at once")
    parser.add_argument("--threads", type=int, default=1, help="threads of each")
    parser.add_argument("--hours", type=float, help="stop after this time; the next call continues")
    parser.add_argument("--any-code", action="store_true", help="count cells of other versions of the code as done")
    parser.add_argument("--report-only", action="store_true", help="write the page from the cells that are there")
    args = parser.parse_args()
    output = args.output.resolve()
    table = Table(
        PROFILES["quick" if args.quick else args.profile],
        data=args.data or _path("RSSEG_ACCURACY_DATA"),
        weights=args.weights or _path("RSSEG_ACCURACY_WEIGHTS"),
        output=output,
        any_code=args.any_code,
        only_settings=args.setting,
        only_arms=args.arm,
        only_seeds=args.seed,
    )
    for line in table.left_out:
        print(f"left out: {line}", flush=True)
    if not args.report_only:
        run_table(table, jobs=args.jobs, hours=args.hours, threads=args.threads)
    docs = args.docs or (output if args.quick else DOCS)
    print(write_report(table, docs))


def _path(variable: str) -> Path | None:
    return Path(os.environ[variable]) if os.environ.get(variable) else None


if __name__ == "__main__":
    main()
