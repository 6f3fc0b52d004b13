"""Small charts as SVG: panels of lines over one time axis, with marks that run through all of them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

WIDTH, PANEL, LEFT, RIGHT, GAP = 900, 110, 70, 20, 26
COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf")


@dataclass(frozen=True, slots=True)
class Panel:
    title: str
    lines: dict[str, Sequence[tuple[float, float]]]  # name -> (seconds, value), in order of time
    steps: bool = False  # values hold until the next one


@dataclass(frozen=True, slots=True)
class Chart:
    title: str
    panels: Sequence[Panel]
    marks: Sequence[tuple[float, str]] = field(default_factory=list)  # (seconds, text), numbered below the panels

    def svg(self) -> str:
        ends = [t for p in self.panels for line in p.lines.values() for t, _ in line]
        end = max([*ends, 1.0])
        height = 40 + len(self.panels) * (PANEL + GAP) + 20 + 14 * len(self.marks)
        parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}"'
            ' font-family="sans-serif" font-size="10">',
            f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
            f'<text x="{LEFT}" y="20" font-size="13">{escape(self.title)}</text>',
        ]
        for number, panel in enumerate(self.panels):
            parts += _panel(panel, 40 + number * (PANEL + GAP), end)
        bottom = 40 + len(self.panels) * (PANEL + GAP)
        for number, (at, _) in enumerate(self.marks, 1):
            x = _x(at, end)
            parts.append(f'<path d="M{x:.1f} 40V{bottom - GAP}" stroke="#888888" stroke-dasharray="3 3"/>')
            parts.append(f'<text x="{x + 2:.1f}" y="{48 + 10 * (number % 3)}" fill="#555555">{number}</text>')
        for i in range(7):
            at = end * i / 6
            parts.append(f'<text x="{_x(at, end):.1f}" y="{bottom - GAP + 14}" text-anchor="middle">{at:.0f} s</text>')
        for number, (at, text) in enumerate(self.marks, 1):
            parts.append(f'<text x="{LEFT}" y="{bottom + 14 * number}">{number}. {at:.1f} s: {escape(text)}</text>')
        return "\n".join([*parts, "</svg>", ""])


def _panel(panel: Panel, top: int, end: float) -> list[str]:
    most = max([v for line in panel.lines.values() for _, v in line] + [1e-9]) * 1.05
    parts = [
        f'<rect x="{LEFT}" y="{top}" width="{WIDTH - LEFT - RIGHT}" height="{PANEL}" fill="none" stroke="#cccccc"/>',
        f'<text x="{LEFT}" y="{top - 4}">{escape(panel.title)}</text>',
        f'<text x="{LEFT - 6}" y="{top + 9}" text-anchor="end">{most:.3g}</text>',
        f'<text x="{LEFT - 6}" y="{top + PANEL}" text-anchor="end">0</text>',
    ]
    for number, (name, line) in enumerate(panel.lines.items()):
        colour, path, before = COLOURS[number % len(COLOURS)], "", None
        for at, value in line:
            x, y = _x(at, end), top + PANEL * (1 - value / most)
            if before is None:
                path = f"M{x:.1f} {y:.1f}"
            else:
                path += f"H{x:.1f}V{y:.1f}" if panel.steps else f"L{x:.1f} {y:.1f}"
            before = y
        parts.append(f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="1.3"/>')
        if len(panel.lines) > 1:
            x = WIDTH - RIGHT - 8
            parts.append(
                f'<text x="{x}" y="{top + 14 + 12 * number}" text-anchor="end" fill="{colour}">{escape(name)}</text>'
            )
    return parts


def _x(at: float, end: float) -> float:
    return LEFT + (WIDTH - LEFT - RIGHT) * at / end
