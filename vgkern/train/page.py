"""A run as one HTML page: curves, samples before and after, settings, timings. No script, nothing
loaded from elsewhere, and what the model wrote is text in it, never markup."""

from __future__ import annotations

import dataclasses
import html
import math
from typing import TYPE_CHECKING, Any

from .log import Log

if TYPE_CHECKING:
    from .config import Config

WIDTH, HEIGHT, EDGE = 640, 220, 44
COLORS = ("#1f77b4", "#ff7f0e", "#2ca02c", "#9467bd")
STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}
table{border-collapse:collapse;width:100%;font-size:13px}
td,th{border-bottom:1px solid #ddd;padding:.25rem .6rem;text-align:left;vertical-align:top}
td{overflow-wrap:anywhere}
pre{background:#f6f6f6;padding:.8rem;overflow-x:auto}
svg{width:100%;height:auto}
figure{margin:1rem 0}
figcaption,.own{font-weight:600}
"""
CURVES = (  # title, its lines: (label, kind of record, field)
    ("Score", (("held out, sampled", "eval", "sampled"), ("held out, greedy", "eval", "greedy"),
               ("training reward", "step", "reward"))),
    ("Length of an answer, tokens", (("sampled", "step", "length"),)),
    ("Share cut off", (("sampled", "step", "cut_off"),)),
    ("Gradient norm", (("before clipping", "step", "grad_norm"),)),
    ("Sampler against trainer, nats", (("largest difference", "step", "sampler_gap"),)),
    ("Time of a step, ms", (("rollout", "step", "ms_rollout"), ("score", "step", "ms_score"),
                            ("update", "step", "ms_update"))),
)  # fmt: skip


def page(config: Config, log: Log, summary: list[str], samples: list[tuple[str, ...]]) -> str:
    """summary: lines of text; samples: rows whose first is the header."""
    title = html.escape(f"{config.task}: vgkern run")
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title>",
        "<meta name=viewport content='width=device-width'>",
        f"<style>{STYLE}</style><h1>{title}</h1>",
        f"<pre>{html.escape(chr(10).join(summary).strip())}</pre>",
    ]
    for name, lines in CURVES:
        drawn = [(label, _points(log, kind, field)) for label, kind, field in lines]
        if any(points for _, points in drawn):
            parts.append(curve(name, drawn))
    parts += ["<h2>Samples</h2>", table(samples), "<h2>Settings</h2>", _settings(config), "</html>"]
    return "\n".join(parts) + "\n"


def _points(log: Log, kind: str, field: str) -> list[tuple[float, float]]:
    found = [(r["step"], r.get(field)) for r in log.of(kind)]
    return [(x, y) for x, y in found if isinstance(y, int | float) and math.isfinite(y)]


def curve(title: str, lines: list[tuple[str, list[tuple[float, float]]]]) -> str:
    """An inline SVG of lines over the RL step, with a legend and the ends of both axes."""
    every = [point for _, points in lines for point in points]
    left, right = min(x for x, _ in every), max(x for x, _ in every)
    low, high = min(y for _, y in every), max(y for _, y in every)
    if title == "Score":
        low, high = min(low, 0.0), max(high, 1.0)
    span = high - low or 1.0

    def place(x: float, y: float) -> str:
        across = EDGE + (x - left) / (right - left or 1.0) * (WIDTH - EDGE - 12)
        return f"{across:.1f},{HEIGHT - 28 - (y - low) / span * (HEIGHT - 44):.1f}"

    drawn, legend = [], []
    for color, (label, points) in zip(COLORS, lines, strict=False):
        text = html.escape(label)
        drawn.append(
            f"<polyline fill=none stroke='{color}' stroke-width=1.8 "
            f"points='{' '.join(place(*p) for p in points)}'><title>{text}</title></polyline>"
        )
        legend.append(f"<span style='color:{color}'>&#9632;</span> {text}")
    base = HEIGHT - 28
    axes = (
        f"<path d='M{EDGE} 12V{base}H{WIDTH - 12}' fill=none stroke='#999'/>"
        f"<g font-size=11 fill='#555'><text x={EDGE - 6} y=20 text-anchor=end>{high:.4g}</text>"
        f"<text x={EDGE - 6} y={base} text-anchor=end>{low:.4g}</text>"
        f"<text x={EDGE} y={HEIGHT - 10}>{left:g}</text>"
        f"<text x={WIDTH - 12} y={HEIGHT - 10} text-anchor=end>step {right:g}</text></g>"
    )
    name = html.escape(title)
    return (
        f"<figure><figcaption>{name}</figcaption><svg viewBox='0 0 {WIDTH} {HEIGHT}' role=img "
        f"aria-label='{name}'>{axes}{''.join(drawn)}</svg><div>{' &nbsp; '.join(legend)}</div>"
        "</figure>"
    )


def table(rows: list[tuple[str, ...]]) -> str:
    head, *body = [[html.escape(cell) for cell in row] for row in rows]
    lines = ["<tr>" + "".join(f"<td>{cell}" for cell in row) for row in body]
    return "<table><tr>" + "".join(f"<th>{cell}" for cell in head) + "\n".join(lines) + "</table>"


def _settings(config: Config) -> str:
    """Those that were changed first."""
    specs: list[Any] = sorted(
        dataclasses.fields(config), key=lambda s: getattr(config, s.name) == s.default
    )
    rows = []
    for spec in specs:
        value = getattr(config, spec.name)
        own = "" if value == spec.default else " class=own"
        cells = (spec.name, repr(value), repr(spec.default), spec.metadata["help"])
        rows.append(f"<tr{own}>" + "".join(f"<td>{html.escape(str(c))}" for c in cells))
    return "<table><tr><th>setting<th>value<th>default<th>\n" + "\n".join(rows) + "</table>"
