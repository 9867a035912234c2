"""A line chart as an SVG, with no library behind it, and a table in Markdown."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence

WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 640, 360, 64, 40, 36, 110
COLOURS = ("#2f6f62", "#b4552d", "#4a5fa5", "#8a6d1f", "#7a4a86", "#555555")


def markdown(head: Sequence[str], *rows: Sequence[str]) -> str:
    """A table, each of whose ``rows`` has a cell for each of ``head``."""
    lines = [f"| {' | '.join(cells)} |" for cells in (head, *rows)]
    return "\n".join([lines[0], "|---" * len(head) + "|", *lines[1:]])


def lines_svg(title: str, curves: Mapping[str, Sequence[tuple[float, float]]]) -> str:
    """One line for each of ``curves``, from points (x, y) with y from 0; names stand at its end."""
    points = [point for curve in curves.values() for point in curve]
    most_x = max((x for x, _ in points), default=1) or 1
    most_y = max((y for _, y in points), default=1) or 1

    def to_pixels(x: float, y: float) -> tuple[float, float]:
        across = LEFT + (WIDTH - LEFT - RIGHT) * x / most_x
        return across, HEIGHT - BOTTOM - (HEIGHT - BOTTOM - TOP) * y / most_y

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'font-family="sans-serif" font-size="12" role="img" aria-label="{html.escape(title)}">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
        f'<text x="{LEFT}" y="20" font-size="14">{html.escape(title)}</text>',
    ]
    for k in range(5):
        x, y = to_pixels(most_x, most_y * k / 4)
        parts.append(
            f'<path d="M{LEFT} {y:.1f}H{x:.1f}" stroke="#dddddd"/>'
            f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{most_y * k / 4:,.0f}</text>'
        )
    for value in sorted({x for x, _ in points}):
        x, _ = to_pixels(value, 0)
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - 20}" text-anchor="middle">{value:g}</text>')
    for i, (name, curve) in enumerate(curves.items()):
        colour = COLOURS[i % len(COLOURS)]
        points = [to_pixels(x, y) for x, y in sorted(curve)]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in points]
        if points:
            x, y = points[-1]
            label = f'<text x="{x + 8:.1f}" y="{y + 4:.1f}" fill="{colour}">'
            parts.append(f"{label}{html.escape(name)}</text>")
    return "".join(parts) + "</svg>\n"
