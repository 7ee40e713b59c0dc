"""The table of runs on another machine, from what `growkit bench --json` wrote there; how docs/h200.md is made.

    python -m growkit.bench.saved benchmarks/results/nvidia-h200/?-*.json [--write docs/h200.md]

Of a row that several runs measured the last one's figure counts; a run goes by the name of its file, number and commit.
"""

import argparse
import json
import re
from pathlib import Path

from growkit.bench.measure import Value
from growkit.bench.table import Goal, Row, render

TABLE = re.compile(r"(<!-- runs -->\n).*(<!-- end -->)", re.DOTALL)


def page(files):
    """The table of all rows, and which of them each run gave."""
    last = {}
    for file in map(Path, files):
        run = json.loads(file.read_text())
        for row in run["rows"]:
            if "value" in row or "value" not in last.get(row["id"], (None, {}))[1]:
                last[row["id"]] = file.stem, row
    rows = [_row(row) for _, row in last.values()]
    by = {}
    for id, (run, _) in last.items():
        by.setdefault(run, []).append(id)
    return "\n".join([render(rows), "", *(f"- run {run}: {', '.join(ids)}" for run, ids in by.items()), ""])


def _row(row):
    goal = Goal(*(row[field] for field in Goal._fields))
    value = Value(row["value"], row["noise"], row["detail"]) if "value" in row else row["reason"]
    return Row(goal, value, row["verdict"] == "FAILED")


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("files", nargs="+", help="JSON of runs, the oldest first")
    parser.add_argument(
        "--write", type=Path, help="page whose table, between <!-- runs --> and <!-- end -->, is replaced"
    )
    asked = parser.parse_args()
    made = page(asked.files)
    if asked.write:
        text, found = TABLE.subn(lambda match: match[1] + made + match[2], asked.write.read_text())
        if not found:
            parser.error(f"--write: {asked.write} has no <!-- runs --> and <!-- end --> after it")
        asked.write.write_text(text)
    else:
        print(made)


if __name__ == "__main__":
    main()
