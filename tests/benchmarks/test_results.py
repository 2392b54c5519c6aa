"""The format of results. Oracles: what was put in; files written by hand; the machine's own words."""

from __future__ import annotations

import argparse
import datetime
import json

import pytest
import results
from protocol import Times
from results import Result, describe_machine, files_of, finish, keep, parse, runs_of


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    return tmp_path


def run(size: int, speed: float) -> dict:
    return {"parameters": {"size": size}, "values": {"speed": speed}}


def test_a_run_takes_the_place_of_the_one_with_the_same_parameters(folder):
    path = keep("nf4_cpu", run(64, 1.0))
    keep("nf4_cpu", run(128, 2.0))
    assert keep("nf4_cpu", run(64, 3.0)) == path
    assert path.name == f"{datetime.date.today()}_{describe_machine()['hardware']}_nf4_cpu.json"
    assert [(r["parameters"]["size"], r["values"]["speed"]) for r in runs_of(path)] == [(128, 2.0), (64, 3.0)]
    content = json.loads(path.read_text())
    assert content["question"] == "nf4_cpu" and content["machine"] == describe_machine()
    assert [file.name for file in folder.iterdir()] == [path.name]


def test_files_of_a_question_are_found_newest_first(folder):
    names = ["2026-01-02_zen4_ops", "2026-02-01_zen4_ops", "2026-01-30_zen4_ops", "2026-03-01_h100_ops"]
    names += ["2026-03-01_zen4_more_ops"]
    for name in names:
        (folder / f"{name}.json").write_text("{}")
    assert [path.stem for path in files_of("ops", "zen4")] == [names[1], names[2], names[0]]
    assert files_of("ops", "zen3") == []


def test_the_last_line_says_everything(folder, capsys):
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", type=int, default=64)
    args = parse(parser, ["--busy", "--write"])
    result = Result("nf4_cpu", {"speed": 1.5}, [{"name": "a", "seconds": 2.0}])
    result.count(Times({"a": [1.0, 1.0, 1.0], "b": [1.0, 1.0, 1.0]}, [0.0, 0.05, 0.02]))
    finish(args, result)
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert said["question"] == "nf4_cpu" and said["speed"] == 1.5 and said["rows"] == result.rows
    assert said["parameters"] == {"size": 64}  # not how it was printed or kept
    assert said["conditions"] == {"quiet": True, "foreign_share": [0.0, 0.05], "noise": 1.0}
    (kept,) = runs_of(next(folder.glob("*.json")))
    assert kept["values"] == {"speed": 1.5} and {k: said[k] for k in kept if k != "values"} == {
        k: v for k, v in kept.items() if k != "values"
    }


def test_one_busy_part_makes_a_result_busy(folder, capsys):
    result = Result("nf4_cpu")
    result.count(Times({"a": [1.0, 1.1], "b": [1.0, 1.0]}, [0.5, 0.5]))
    result.count(Times({"a": [1.0], "b": [1.0]}, [0.0]))
    assert result.conditions == {"quiet": False, "foreign_share": [0.0, 0.5], "noise": 1.0}
    finish(parse(argparse.ArgumentParser(), ["--busy"]), result)
    assert "others used the machine meanwhile" in capsys.readouterr().err
    assert not list(folder.iterdir())


def test_the_machine_is_named(monkeypatch):
    text = "vendor_id\t: {}\ncpu family\t: {}\nmodel\t\t: {}\nmodel name\t: X\nflags\t\t: avx2 {}\n\nprocessor: 1\n"
    for vendor, family, model, flags, expected in [
        ("AuthenticAMD", 25, 17, "avx512_bf16 hypervisor", ("zen4", True, ["avx2", "avx512_bf16"])),
        ("AuthenticAMD", 25, 1, "", ("zen3", False, ["avx2"])),
        ("GenuineIntel", 6, 143, "amx_bf16", ("sapphirerapids", False, ["avx2", "amx_bf16"])),
    ]:
        filled = text.format(vendor, family, model, flags)
        monkeypatch.setattr(results.Path, "read_text", lambda path, filled=filled: filled)
        cpu = results._cpu()
        assert (cpu["name"], cpu["virtual"], cpu["instructions"]) == expected
