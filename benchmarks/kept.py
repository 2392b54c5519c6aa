"""What the results files say, for the texts that are made of them: the newest measurement on a machine, HARDWARE where
none is named."""

from __future__ import annotations

from typing import Any

from results import FOLDER, files_of, runs_of

HARDWARE = "zen4-2vcpu"


class NotMeasured(LookupError):
    """There is no such run on the machine yet."""


def run(question: str, hardware: str = HARDWARE, **parameters: Any) -> dict[str, Any]:
    """The newest run with these parameters. NotMeasured if there is none."""
    for candidate in all_runs(question, hardware):
        if all(candidate["parameters"].get(name) == value for name, value in parameters.items()):
            return candidate
    raise NotMeasured(f"no file of {question} on {hardware} has a run with {parameters}")


def all_runs(question: str, hardware: str = HARDWARE) -> list[dict[str, Any]]:
    """Newest first; none, if it was never measured."""
    return [run for path in files_of(question, hardware) for run in reversed(runs_of(path))]


def rows(question: str, key: str, **parameters: Any) -> dict[Any, dict[str, Any]]:
    """The rows of a run by one of their columns."""
    return {row[key]: row for row in run(question, **parameters)["rows"]}


def questions() -> set[str]:
    """All that was measured on the machine."""
    return {path.stem.split("_", 2)[2] for path in FOLDER.glob(f"*_{HARDWARE}_*.json")}


def any_was_disturbed(question: str) -> bool:
    """Whether others used the machine during a run of the newest file."""
    return any(run["conditions"].get("quiet") is False for run in runs_of(files_of(question, HARDWARE)[0]))


def merged(question: str) -> dict[str, Any]:
    """The values of all runs; of those that share a name the newest."""
    return {name: value for run in reversed(all_runs(question)) for name, value in run["values"].items()}


def picture(question: str, what: str, hardware: str = HARDWARE) -> str:
    """The newest one; light or dark, as the reader's page is, if there are both."""
    path = next((path for path in files_of(question, hardware) if path.with_suffix(".png").exists()), None)
    if path is None:
        raise NotMeasured(f"no result of {question} on {hardware} has a picture")
    stem = f"benchmarks/results/{path.stem}"
    if not path.with_name(f"{path.stem}_dark.png").exists():
        return f"![{what}]({stem}.png)"
    return (
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="{stem}_dark.png">'
        f'<img alt="{what}" src="{stem}.png"></picture>'
    )
