"""A plan's memory as a picture: a bar for each pipeline stage, of its parts; the accelerator's memory is a line."""

from __future__ import annotations

from pathlib import Path
from xml.sax.saxutils import escape

from megakor.files import atomic_write
from megakor.plan.memory import GIB
from megakor.plan.plan import Plan

COLORS = {
    "weights": "#4e79a7",
    "gradients": "#f28e2b",
    "optimizer": "#e15759",
    "activations": "#76b7b2",
    "logits": "#59a14f",
    "buffers": "#edc948",
    "margin": "#bab0ac",
}
WIDTH, LEFT, BAR, GAP, TOP = 760, 250, 26, 12, 70  # pixels


def picture(plan: Plan) -> str:
    """The picture as SVG."""
    most = 1.02 * max(plan.capacity, plan.fullest.total)
    scale = (WIDTH - LEFT - 70) / most
    height = TOP + len(plan.stages) * (BAR + GAP) + 30
    title = escape(f"{plan.name}: GiB of a rank on {plan.dims.world_size} × {plan.hardware.name}")
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif"',
        ' font-size="13">',
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
        f'<text x="10" y="22" font-size="15">{title}</text>',
    ]
    x = 10
    for name, color in COLORS.items():
        lines.append(f'<rect x="{x}" y="36" width="12" height="12" fill="{color}"/>')
        lines.append(f'<text x="{x + 17}" y="47">{name}</text>')
        x += 32 + 8 * len(name)
    for stage in plan.stages:
        y, start = TOP + stage.stage * (BAR + GAP), float(LEFT)
        lines.append(f'<text x="10" y="{y + 18}">{escape(f"{stage.stage}: {stage.holds}")}</text>')
        for name, num_bytes in stage.parts.items():
            width = num_bytes * scale
            lines.append(f'<rect x="{start:.1f}" y="{y}" width="{width:.1f}" height="{BAR}" fill="{COLORS[name]}"/>')
            start += width
        lines.append(f'<text x="{start + 6:.1f}" y="{y + 18}">{stage.total / GIB:.1f}</text>')
    x, bottom = LEFT + round(plan.capacity * scale), height - 30
    lines.append(f'<line x1="{x}" y1="{TOP - 8}" x2="{x}" y2="{bottom}" stroke="#000000" stroke-dasharray="4 3"/>')
    lines.append(f'<text x="{x}" y="{bottom + 18}" text-anchor="middle">{plan.hardware.memory_gib:g}</text>')
    return "\n".join([*lines, "</svg>"]) + "\n"


def write_picture(plan: Plan, path: str) -> None:
    """Write the picture to a file. OSError where that is not possible."""
    with atomic_write(Path(path)) as file:
        file.write(picture(plan).encode())
