"""The measured numbers of README.md and INTERVIEW.md, made from benchmarks/results/ and never typed.

    python benchmarks/readme.py             # after new results: writes the generated regions anew
    python benchmarks/readme.py --check     # exit status 1 if a region is not what the results say

A region stands between two comments, which nobody sees where Markdown is rendered:

    <!-- numbers: checkpoint -->
    An asynchronous save stops training for 4 ms ...
    <!-- end -->

What stands there is what the function of that name in `readme_regions` returns, or "(not measured yet)", so a text with
a number in it is changed there. A measured number outside of a region is refused by `stray_numbers`, unless its line
says in a comment of its own where it comes from (tests/benchmarks/test_readme.py checks all of this):

    <!-- from: benchmarks/results/FILE or a test -->        that file exists
    <!-- given -->                                          nothing was measured: a requirement, a setting, a definition
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from kept import NotMeasured
from readme_regions import REGIONS

ROOT = Path(__file__).parents[1]
DOCUMENTS = ("README.md", "INTERVIEW.md")

_REGION = re.compile(r"(<!-- numbers: (\S+) -->)(.*?)(<!-- end -->)", re.DOTALL)
_UNITS = "×(?! ?[0-9])|times as|%|[KMG]i?B(?:/s)?|[num]?s|min|minutes|seconds|hours|tokens/s|[GT]FLOP/s|MFU"
_DECIMAL = r"(?<!≥ )\d+\.\d{2,}(?![\d.])"  # a ratio or a loss; not a version like 2.13.0 or ≥ 3.11
_NUMBER = re.compile(rf"(?<![\w.])(?:\d[\d.,]*[  -]?(?:{_UNITS})(?![\w/])|{_DECIMAL}|\d+ of \d+)")
_SOURCE = re.compile(r"<!-- from: (\S+) -->")
_CODE = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)
_GIVEN = "<!-- given -->"


def regenerate(text: str, regions: Mapping[str, Callable[[], str]] = REGIONS) -> str:
    """`text` with every region made anew. ValueError for a region that nobody makes."""

    def make(match: re.Match[str]) -> str:
        begin, name, old, end = match.groups()
        if name not in regions:
            raise ValueError(f"nothing makes the region {name!r}; valid: {', '.join(regions)}")
        try:
            made = regions[name]()
        except NotMeasured:
            made = "(not measured yet)"
        return f"{begin}\n{made}\n{end}" if old.startswith("\n") else f"{begin}{made}{end}"

    return _REGION.sub(make, text)


def stray_numbers(text: str) -> list[str]:
    """What looks measured and does not say where it comes from: "line 12: 1.22 times as ...". Code is not read."""

    def blank(match: re.Match[str]) -> str:
        return "\n" * match.group().count("\n")

    hidden = _CODE.sub(blank, _REGION.sub(blank, text))
    found = []
    for number, line in enumerate(hidden.splitlines(), start=1):
        if _GIVEN not in line and not _SOURCE.search(line):
            found += [f"line {number}: {match}" for match in _NUMBER.findall(re.sub(r"`[^`]*`", "", line))]
    return found


def sources(text: str) -> list[str]:
    """The files that lines outside of regions name as their numbers' source."""
    return _SOURCE.findall(_REGION.sub("", text))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing, and fail if something would change")
    args = parser.parse_args()
    stale = []
    for name in DOCUMENTS:
        path = ROOT / name
        text = path.read_text(encoding="utf-8")
        made = regenerate(text)
        stale += [name] if made != text else []
        if not args.check:
            path.write_text(made, encoding="utf-8")
        for number in stray_numbers(made):
            print(f"{name}, {number}: a number without a source")
    print(f"{'stale' if args.check else 'written'}: {', '.join(stale) or 'nothing'}")
    raise SystemExit(1 if args.check and stale else 0)


if __name__ == "__main__":
    main()
