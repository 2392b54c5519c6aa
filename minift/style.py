"""How every picture looks: one palette, sizes that are readable where a README shows them, light and dark.

    save(path, draw, size=(9, 4))               draw(figure, theme) on a new figure, written whole or not at all
    save_light_and_dark(path, draw)             beside it the dark one, as <name>_dark.png

`draw` takes colours from the theme only. Colours of a series are told apart in both themes and by most colour-blind
readers (Okabe and Ito's set, lightened for the dark ground); no picture needs more than eight.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 130  # 9 inches are 1170 pixels: a README shows them at three quarters


@dataclass(frozen=True)
class Theme:
    """ground: behind everything. ink: text and axes. quiet: what is beside the point. series: in the order of use.
    on_colour: text upon a filled area."""

    name: str
    ground: str
    ink: str
    quiet: str
    series: tuple[str, ...]
    on_colour: str

    @property
    def ours(self) -> str:
        """minift, wherever it is compared with others."""
        return self.series[0]

    @property
    def theirs(self) -> str:
        return self.series[1]

    def settings(self) -> dict[str, Any]:
        """matplotlib's, for everything that is made while they hold."""
        from cycler import cycler

        return {
            "figure.facecolor": self.ground, "savefig.facecolor": self.ground, "axes.facecolor": self.ground,
            "text.color": self.ink, "axes.labelcolor": self.ink, "axes.titlecolor": self.ink,
            "axes.edgecolor": self.quiet, "xtick.color": self.quiet, "ytick.color": self.quiet,
            "xtick.labelcolor": self.ink, "ytick.labelcolor": self.ink, "grid.color": self.quiet, "grid.alpha": 0.25,
            "axes.grid": True, "axes.axisbelow": True, "axes.spines.top": False, "axes.spines.right": False,
            "axes.prop_cycle": cycler(color=self.series), "lines.linewidth": 1.8, "legend.frameon": False,
            "font.size": 10, "axes.titlesize": 10.5, "axes.titlelocation": "left", "axes.labelsize": 10,
            "xtick.labelsize": 9, "ytick.labelsize": 9, "legend.fontsize": 9, "hatch.color": self.ground,
        }  # fmt: skip


LIGHT = Theme(
    "light", ground="#ffffff", ink="#1f2328", quiet="#7d8590", on_colour="#ffffff",
    series=("#0b62a4", "#d5691f", "#1a936f", "#b5519b", "#c99700", "#4aa3d8", "#8a6d4b", "#6e7781"),
)  # fmt: skip
DARK = Theme(
    "dark", ground="#0d1117", ink="#e6edf3", quiet="#848d97", on_colour="#0d1117",
    series=("#58a6e8", "#f2945a", "#4cc79a", "#d98ac4", "#e3bd3f", "#9bd3f5", "#bd9c74", "#9aa4af"),
)  # fmt: skip

Draw = Callable[["Figure", Theme], None]


def save(path: Path, draw: Draw, *, size: tuple[float, float] = (9.0, 4.5), theme: Theme = LIGHT) -> Path:
    """Call draw(figure, theme) with an empty figure of `size` inches; write it as PNG to `path`, and return that."""
    # Only those who draw wait for matplotlib, half a second on every rank otherwise.
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(theme.settings()):
        figure = Figure(figsize=size, dpi=DPI, layout="constrained")
        draw(figure, theme)
        unfinished = path.with_name(f"{path.stem}.unfinished{path.suffix}")
        figure.savefig(unfinished, format="png")
    os.replace(unfinished, path)  # a viewer that is open on the picture never sees half of one
    return path


def save_light_and_dark(path: Path, draw: Draw, *, size: tuple[float, float] = (9.0, 4.5)) -> list[Path]:
    """`path`, light, and dark beside it."""
    dark = path.with_name(f"{path.stem}_dark{path.suffix}")
    return [save(path, draw, size=size), save(dark, draw, size=size, theme=DARK)]


def label_bars(axes: Axes, bars: Any, texts: list[str]) -> None:
    """A text at the end of each horizontal bar, with room for it."""
    axes.bar_label(bars, texts, padding=3, fontsize=9)
    axes.margins(x=0.2, y=0.03)
    axes.grid(visible=False, axis="y")


def three_digits(value: float) -> str:
    """1596.47 -> 1,600; 0.0039 -> 0.0039."""
    return f"{float(f'{value:.3g}'):,.10g}"
