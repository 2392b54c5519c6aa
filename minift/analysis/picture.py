"""Four panels of what fine-tuning did, by block and by kind of projection; and the same as a table and as JSON."""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from minift.analysis.spectrum import WeightAnalysis
from minift.style import Theme, save_light_and_dark

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def write_analysis(folder: Path, analyses: Sequence[WeightAnalysis]) -> list[Path]:
    """analysis.json, analysis.png and analysis_dark.png in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "analysis.json"
    plain = [asdict(analysis) | {"amplification": _finite(analysis.amplification)} for analysis in analyses]
    path.write_text(json.dumps(plain, indent=1) + "\n", encoding="utf-8")
    pictures = save_light_and_dark(
        folder / "analysis.png", lambda figure, theme: _draw(figure, theme, analyses), size=(9.0, 6.4)
    )
    return [path, *pictures]


def table(analyses: Sequence[WeightAnalysis]) -> str:
    """A line for each kind of projection, medians over the blocks, intruders in total; "base's": the base's share of
    them, the median again."""
    lines = [f"{'':14} weights  intruders  base's  eff. rank  amplif.  |dW|/|W|  dir. change"]
    for kind, group in _by_kind(analyses).items():
        rank, amplification, ratio, direction = (
            statistics.median(getattr(analysis, field) for analysis in group)
            for field in ("effective_rank", "amplification", "update_ratio", "direction_change")
        )
        base_shares = [intruder.base_share for analysis in group for intruder in analysis.intruders]
        base_share = f"{statistics.median(base_shares):.2f}" if base_shares else ""
        lines.append(
            f"{kind:14}{len(group):8}{len(base_shares):11}{base_share:>8}{rank:11.1f}{amplification:9.2f}{ratio:10.4f}"
            f"{direction:13.2e}"
        )
    return "\n".join(lines)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None  # JSON has no infinity


def _by_kind(analyses: Sequence[WeightAnalysis]) -> dict[str, list[WeightAnalysis]]:
    groups: dict[str, list[WeightAnalysis]] = {}
    for analysis in analyses:
        groups.setdefault(analysis.name.rpartition(".")[2], []).append(analysis)
    return groups


def _block(analysis: WeightAnalysis) -> int:
    """Number of the block; -1 outside of blocks."""
    found = re.search(r"layers\.(\d+)\.", analysis.name)
    return int(found[1]) if found else -1


def _draw(figure: Figure, theme: Theme, analyses: Sequence[WeightAnalysis]) -> None:
    (intruders, rank), (amplification, direction) = figure.subplots(2, 2)
    bottom: dict[int, int] = {}
    for colour, (kind, group) in zip(theme.series * len(analyses), _by_kind(analyses).items(), strict=False):
        blocks = [_block(analysis) for analysis in group]
        counts = [len(analysis.intruders) for analysis in group]
        intruders.bar(blocks, counts, bottom=[bottom.get(block, 0) for block in blocks], color=colour, label=kind)
        for block, count in zip(blocks, counts, strict=True):
            bottom[block] = bottom.get(block, 0) + count
        _line(rank, blocks, [analysis.effective_rank for analysis in group], colour)
        _line(amplification, blocks, [analysis.amplification for analysis in group], colour)
        direction.scatter(
            [analysis.direction_change for analysis in group], [analysis.magnitude_change for analysis in group],
            color=colour, s=18, label=kind,
        )  # fmt: skip
    intruders.set_title("intruder dimensions in each block")
    rank.set_title("effective rank of ΔW")
    amplification.set_title("amplification, ‖ΔW‖ over ‖W‖ in its directions")
    direction.set_title("change of each weight's rows")
    direction.set(xlabel="direction: 1 − cosine", ylabel="magnitude")
    for axes in (intruders, rank, amplification):
        axes.set_xlabel("block")
    if not any(bottom.values()):
        intruders.set_ylim(0, 1)
    intruders.yaxis.get_major_locator().set_params(integer=True)
    for axes in (rank, amplification):
        axes.set_ylim(bottom=0)
    direction.legend(fontsize=8)


def _line(axes: Axes, blocks: list[int], values: list[float], colour: str) -> None:
    axes.plot(blocks, values, color=colour, marker=".", linewidth=1.4)
