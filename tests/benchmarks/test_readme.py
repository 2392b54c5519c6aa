"""README.md and INTERVIEW.md say what was measured. Oracles: the results files, made into text again; made-up texts."""

from __future__ import annotations

import json
import re

import pytest
import readme
from kept import NotMeasured
from readme import DOCUMENTS, ROOT, regenerate, sources, stray_numbers
from readme_regions import REGIONS

texts = pytest.mark.parametrize("name", DOCUMENTS)


@texts
def test_generated_regions_are_what_the_results_say(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    assert regenerate(text) == text, "benchmarks/results/ has other numbers; python benchmarks/readme.py writes them"


@texts
def test_no_measured_number_stands_alone(name):
    """A number that is typed grows old unseen. Put it into a region (benchmarks/readme_regions.py), or say behind it
    where it comes from: <!-- from: FILE -->, or <!-- given --> if nobody measured it."""
    text = (ROOT / name).read_text(encoding="utf-8")
    assert stray_numbers(text) == []
    assert all((ROOT / source).exists() for source in sources(text))


@texts
def test_every_file_that_is_named_exists(name):
    """Links, pictures, and whatever looks like a path of this repository."""
    text = (ROOT / name).read_text(encoding="utf-8")
    linked = re.findall(r'(?:\]\(|src="|srcset=")([^)"#]+)', text)
    folders, endings = "minift|tests|benchmarks|launch|csrc", "py|sh|md|yaml|h|json|png"
    quoted = re.findall(rf"(?<![\w/.])(?:{folders})/[\w/.-]*\w\.(?:{endings})", text)
    paths = {path for path in linked + quoted if not path.startswith("http")}
    assert paths and [path for path in sorted(paths) if not (ROOT / path).exists()] == []


def test_every_region_is_used():
    everywhere = "".join((ROOT / name).read_text(encoding="utf-8") for name in DOCUMENTS)
    assert set(re.findall(r"<!-- numbers: (\S+) -->", everywhere)) == REGIONS.keys()


def test_results_are_complete():
    """Every kept result names its machine, command, commit and conditions, and was measured on a quiet machine or says
    that it was not."""
    kept = sorted((ROOT / "benchmarks" / "results").glob("*.json"))
    assert kept
    for path in kept:
        content = json.loads(path.read_text(encoding="utf-8"))
        date, hardware, question = path.stem.split("_", 2)
        assert content["question"] == question and content["date"] == date, path.name
        assert content["machine"]["hardware"] == hardware, path.name
        for run in content["runs"]:
            assert {"values", "rows", "parameters", "command", "commit", "conditions"} <= run.keys(), path.name
            assert not run["conditions"] or isinstance(run["conditions"]["quiet"], bool), path.name


# The mechanism #

TEXT = """\
<!-- numbers: block -->
old
<!-- end -->
| a | <!-- numbers: cell -->1×<!-- end --> |
"""


def test_regions_are_replaced_and_nothing_else():
    made = regenerate(TEXT, {"block": lambda: "| 2 |", "cell": lambda: "3.5× as fast"})
    assert made == TEXT.replace("old", "| 2 |").replace("1×", "3.5× as fast")
    assert regenerate(made, {"block": lambda: "| 2 |", "cell": lambda: "3.5× as fast"}) == made

    def missing() -> str:
        raise NotMeasured

    assert regenerate(TEXT, {"block": lambda: "2", "cell": missing}).endswith(" -->(not measured yet)<!-- end --> |\n")
    with pytest.raises(ValueError, match="nothing makes the region 'block'; valid: cell"):
        regenerate(TEXT, {"cell": str})


@pytest.mark.parametrize(
    "line",
    ["1.22 times as fast", "takes 4 ms", "26 MiB", "466 tokens/s", "85 % hidden", "2.8× forward", "in 5.2 min",
     "**1.65**", "50 of 80", "0.516 bytes", "201 GFLOP/s", "12 seconds"],
)  # fmt: skip
def test_numbers_without_a_source_are_found(line):
    assert len(stray_numbers(f"first\n{line}\n")) == 1 and stray_numbers(f"first\n{line}\n")[0].startswith("line 2: ")
    for sourced in (f"{line} <!-- from: README.md -->", f"{line} <!-- given -->", f"```\n{line}\n```", f"`{line}`",
                    f"<!-- numbers: a -->\n{line}\n<!-- end -->"):  # fmt: skip
        assert stray_numbers(sourced) == []
    assert sources(f"{line} <!-- from: README.md -->") == ["README.md"]


@pytest.mark.parametrize(
    "line",
    ["Python ≥ 3.11 and torch 2.13.0", "1×8, 2×4 or 4×2 (ranks × microbatches)", "2 × 512 tokens", "SmolLM2-135M",
     "r = 16", "4 bits", "blocks of 64", "2 processes", "sm_90a", "4096², bf16", "W13 and C1–C14",
     "32/64 = 0.5 bits", "1e-6"],
)  # fmt: skip
def test_other_numbers_are_left_alone(line):
    assert stray_numbers(line) == []


def test_the_check_fails_when_results_are_newer(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(readme, "ROOT", tmp_path)
    monkeypatch.setattr(readme, "DOCUMENTS", ("A.md",))
    monkeypatch.setattr(readme, "regenerate", lambda text: text.replace("old", "new"))
    (tmp_path / "A.md").write_text("old")
    for arguments, status, left in (["--check"], 1, "old"), ([], 0, "new"), (["--check"], 0, "new"):
        monkeypatch.setattr("sys.argv", ["readme.py", *arguments])
        with pytest.raises(SystemExit) as stopped:
            readme.main()
        assert stopped.value.code == status and (tmp_path / "A.md").read_text() == left
