"""Tables and figures of the records: python -m benchmarks.evidence.report [--out docs/results]

A page says with <!-- table NAME --> and <!-- end --> where a table goes; what stands between is replaced.
"""

import argparse
import re
from pathlib import Path

from benchmarks.evidence import growth_tables, sophia_tables
from benchmarks.evidence.figures import FIGURES
from benchmarks.evidence.results import Results

TABLES = sophia_tables.TABLES | growth_tables.TABLES


def filled(page, results):
    """The text of a page with its tables as the records have them."""

    def made(match):
        return "\n".join([match[1], "", *TABLES[match[2]](results), "", "<!-- end -->"])

    return re.sub(r"(<!-- table (\w+) -->).*?<!-- end -->", made, page, flags=re.DOTALL)


def main(arguments=None):
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.evidence.report", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    out = parser.parse_args(arguments).out
    results = Results(out / "data")
    for page in out.glob("*.md"):
        page.write_text(filled(page.read_text(), results))
    for name, figure in FIGURES.items():
        figure(results).savefig(out / f"{name}.png", dpi=110)


if __name__ == "__main__":
    main()
