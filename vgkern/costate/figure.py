"""Costate norms of one text as a picture: layers up, tokens along, colour for the size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from vgkern.ops import _check

INSTALL = "pip install matplotlib"
WIDEST = 64  # tokens a reader can still tell apart; of a longer text its end is drawn
DECADES = 4  # of the colour scale, down from the largest; smaller norms have its last colour


def draw_costates(
    norms: Tensor,  # [layers + 1, T], one text's of `ProbeResult.norms`
    tokens: Sequence[str],  # T of them
    prompt: int,  # how many of them are the prompt's
    path: str | Path,
    *,
    title: str,
    unit: str = "nats per unit of x",
    ratio: Tensor | None = None,  # [layers + 1, 2]: signal-to-noise of a layer, standard error
) -> None:
    """Writes a PNG. Grey: no gradient reaches the place.

    Raises ModuleNotFoundError with the remedy without matplotlib, ValueError naming the argument
    for sizes that do not match.
    """
    try:
        from matplotlib.colors import LogNorm
        from matplotlib.figure import Figure
    except ImportError:
        raise ModuleNotFoundError(f"the picture needs matplotlib: {INSTALL}") from None
    if norms.ndim != 2 or norms.shape[1] != len(tokens) or not len(tokens):
        raise _check.fail("norms", norms, f"[layers + 1, T] for the T = {len(tokens)} tokens >= 1")
    if not 0 <= prompt <= len(tokens):
        raise _check.fail("prompt", prompt, f"0 <= prompt <= {len(tokens)} tokens")
    cut = max(0, len(tokens) - WIDEST)
    shown, labels = norms[:, cut:].double().cpu(), [_label(t) for t in tokens[cut:]]
    depth, width = shown.shape
    some = shown[shown.isfinite() & (shown > 0)]
    top = float(some.max()) if len(some) else 1.0
    low = max(float(some.min()) if len(some) else 0.0, top * 10.0**-DECADES) * 0.999

    slim = 0 if ratio is None else 1.7
    size = (min(14.0, 2.6 + 0.24 * width) + slim, min(7.5, 2.4 + 0.26 * depth))
    figure = Figure(figsize=(max(7.8, size[0]), max(3.6, size[1])), layout="constrained")
    if ratio is None:
        axes: Any = figure.subplots()
    else:
        axes, side = figure.subplots(1, 2, sharey=True, width_ratios=[size[0] - slim, slim])
        _side(side, ratio.double().cpu(), depth)
    axes.set_facecolor("0.88")
    image = axes.pcolormesh(
        range(width + 1), [i - 0.5 for i in range(depth + 1)], shown.where(shown > 0, math.nan),
        norm=LogNorm(low, top), cmap="viridis", edgecolors="white", linewidth=0.3,
    )  # fmt: skip
    _tokens(axes, labels, prompt - cut)
    along = f"; the last {width} of {len(tokens)} are shown" if cut else ""
    axes.set_xlabel(f"token at the position (grey: no gradient arrives there{along})")
    rows = list(range(0, depth, max(1, -(-depth // 16))))
    axes.set_yticks(rows, ["input" if row == 0 else str(row) for row in rows])
    axes.set(ylabel="residual stream x after layer", ylim=(-0.5, depth - 0.5))
    axes.set_title(title, fontsize=10, pad=18, loc="left")
    if len(some):
        extend = "min" if float(some.min()) < low else "neither"
        bar = figure.colorbar(image, ax=axes, pad=0.01, aspect=30, extend=extend)
        bar.set_label(f"costate norm ({unit})", fontsize=9)
    figure.savefig(path, dpi=150)


def _tokens(axes: Any, labels: list[str], prompt: int) -> None:
    """The text along the axis, and where the response begins (`prompt` may be off the picture)."""
    small = 9 if len(labels) <= 40 else 8
    axes.set_xticks([i + 0.5 for i in range(len(labels))], labels, fontsize=small)
    for at, label in enumerate(axes.get_xticklabels()):
        label.set(parse_math=False, family="monospace")  # a dollar sign is a dollar sign
        label.set(rotation=90 if len(labels[at]) > 1 else 0)
        label.set(color="0.35" if at < prompt else "black")
    axes.tick_params(axis="x", length=0)
    if 0 < prompt < len(labels):
        axes.axvline(prompt, color="tab:red", lw=1.5)
        for name, side, shift in (("prompt", "right", -4), ("response", "left", 4)):
            axes.annotate(
                name, (prompt, 1), (shift, 3), xycoords=("data", "axes fraction"),
                textcoords="offset points", ha=side, va="bottom", color="tab:red", fontsize=9,
            )  # fmt: skip


def _side(axes: Any, ratio: Tensor, depth: int) -> None:
    """Signal-to-noise of each layer, beside its row."""
    value, error = ratio.unbind(-1)
    axes.axvline(0, color="0.7", lw=0.8)
    axes.errorbar(
        value, range(depth), xerr=error.nan_to_num(0), color="tab:blue", marker="o", ms=3, lw=1,
        capsize=2,
    )  # fmt: skip
    axes.set_title("value-gradient signal\nof all prompts", fontsize=9)
    axes.set_xlabel("S2 / noise\n(± standard error)", fontsize=9)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def _label(text: str) -> str:
    """A token as it can stand under a column: blanks seen, never long."""
    text = text.replace(" ", "␣").replace("\n", "↵").replace("\t", "⇥")
    text = "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)
    return text if len(text) <= 12 else text[:11] + "…"
