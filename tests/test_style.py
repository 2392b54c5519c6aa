"""Pictures: written whole, in their theme, readable. Oracles: pixels; the contrast formula of WCAG 2.1."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from matplotlib import colors, image

from minift.style import DARK, DPI, LIGHT, Theme, save, save_light_and_dark, three_digits


def luminance(colour: str) -> float:
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in colors.to_rgb(colour)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: str, b: str) -> float:
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=lambda theme: theme.name)
def test_everything_can_be_told_from_the_ground(theme: Theme) -> None:
    assert contrast(theme.ink, theme.ground) >= 7  # WCAG: text, enhanced
    assert contrast(theme.quiet, theme.ground) >= 3  # WCAG: parts of graphics
    for colour in theme.series:
        assert contrast(colour, theme.ground) >= 2.5, colour  # lines are thick
    for a, b in itertools.combinations(theme.series, 2):
        distance = sum((x - y) ** 2 for x, y in zip(colors.to_rgb(a), colors.to_rgb(b), strict=True)) ** 0.5
        assert distance > 0.2, (a, b)


def test_light_and_dark(tmp_path: Path) -> None:
    seen = []

    def draw(figure, theme) -> None:
        seen.append(theme)
        figure.subplots().plot([1, 2])

    paths = save_light_and_dark(tmp_path / "a.png", draw, size=(4, 3))
    assert sorted(tmp_path.iterdir()) == sorted(paths) == [tmp_path / "a.png", tmp_path / "a_dark.png"]
    assert seen == [LIGHT, DARK]
    for path, theme in zip(paths, seen, strict=True):
        picture = image.imread(path)
        assert picture.shape[:2] == (3 * DPI, 4 * DPI)
        found = {tuple((pixel * 255).round().astype(int)) for row in picture[..., :3] for pixel in row}
        for colour in (theme.ground, theme.ours):
            assert tuple(round(255 * c) for c in colors.to_rgb(colour)) in found


def test_half_a_picture_is_never_there(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", lambda figure, theme: figure.subplots())
    before = path.read_bytes()

    def fail(figure, theme) -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        save(path, fail)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_numbers_beside_bars_are_short() -> None:
    values = [1596.47, 0.0039, 26.486, 1.0, 12_345_678.0, 0.0]
    assert [three_digits(value) for value in values] == ["1,600", "0.0039", "26.5", "1", "12,300,000", "0"]
