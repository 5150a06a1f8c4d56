"""The report's two pictures, drawn with matplotlib and no display."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

INK, MUTED, FAINT, MISSED = "#1f2328", "#6e7781", "#d8dee4", "#f0dfd2"
COLOURS = {"stock": "#57606a", "ours": "#0969da", "simulated": "#bc4c00"}
KINDS = {"stock": "vLLM's own attention", "ours": "HieraSparse backend", "simulated": "simulated rival"}


def pareto(report: dict[str, Any], path: Path) -> bool:
    """Draw loss above dense and KL divergence against bytes, a labelled point per arm that saves; False if none does.

    Parameters
    ----------
    report : dict
        From `report.build`.
    path : Path
        PNG file to write.
    """
    arms = [arm for arm in report["arms"] if arm["kl"] is not None and arm["bytes"] < 0.999]
    if not arms:
        return False
    plt = _pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(11, 5), layout="constrained")
    for axis, field, title in (
        (axes[0], "delta", "Loss above dense (nats per token)"),
        (axes[1], "kl", "KL divergence from dense (nats per token)"),
    ):
        values = [arm[field] for arm in arms]
        if min(values) > 0:
            axis.set_yscale("log")
            axis.set_ylim(min(values) / 2, max(values) * 2)
        else:  # an arm that is better than dense, or equal to it: linear around zero, up to a power of ten
            size = max(map(abs, values)) or 1e-6
            linear = 10.0 ** round(math.log10(size / 30))
            axis.set_yscale("symlog", linthresh=linear)
            axis.set_ylim(2 * min(values) - linear / 2, max(2 * max(values), linear))
            axis.axhline(0, color=MUTED, linewidth=0.8)
        axis.set_xlim(min(0.3, min(arm["bytes"] for arm in arms) - 0.05), 1.0)
        for kind in COLOURS:
            chosen = [arm for arm in arms if arm["kind"] == kind]
            axis.scatter(
                [arm["bytes"] for arm in chosen], [arm[field] for arm in chosen], s=42, color=COLOURS[kind],
                label=KINDS[kind] if chosen else None, zorder=3, edgecolor="white", linewidth=0.8,
            )  # fmt: skip
        axis.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
        axis.yaxis.set_minor_formatter(lambda y, _: "")
        _label(axis, [(arm["bytes"], arm[field], arm["name"], COLOURS[arm["kind"]]) for arm in arms])
        axis.set_title(title, loc="left", fontsize=11, color=INK)
        axis.set_xlabel("bytes of a page, share of a dense 16-bit cache", color=MUTED)
        axis.xaxis.set_major_formatter(lambda x, _: f"{100 * x:.0f} %")
    figure.legend(*axes[0].get_legend_handles_labels(), frameon=False, fontsize=9, loc="outside lower left", ncols=3)
    figure.suptitle(
        f"{report['model_name']}: fewer bytes to the left, closer to dense below", fontsize=12, x=0.01, ha="left"
    )
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return True


def needles(report: dict[str, Any], path: Path) -> bool:
    """Draw for each arm which pass keys were found, depth by length; False if no pass key was asked.

    Parameters and result as in `pareto`.  The grid's samples are shown, or those of the passkey task without a grid.
    """
    task = "needles" if "needles" in report["tasks"] else "passkey"
    arms = [arm for arm in report["arms"] if arm["status"] == "ok" and task in arm["tasks"]]
    if not arms:
        return False
    import numpy as np
    from matplotlib.colors import LinearSegmentedColormap

    plt = _pyplot()
    trials = arms[0]["tasks"][task]["trials"]
    lengths, depths = sorted({t["length"] for t in trials}), sorted({t["depth"] for t in trials})
    columns = min(4, len(arms))
    rows = -(-len(arms) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(1.2 + 2.3 * columns, 0.9 + 2.4 * rows), squeeze=False, sharex=True, sharey=True,
        layout="constrained",
    )  # fmt: skip
    colours, image = LinearSegmentedColormap.from_list("found", [MISSED, COLOURS["ours"]]), None
    for axis, arm in zip(axes.flat, arms):
        grid = np.full((len(depths), len(lengths)), np.nan)
        for depth in depths:
            for length in lengths:
                cell = [
                    t["score"] for t in arm["tasks"][task]["trials"] if (t["depth"], t["length"]) == (depth, length)
                ]
                if cell:
                    grid[depths.index(depth), lengths.index(length)] = sum(cell) / len(cell)
        image = axis.imshow(grid, aspect="auto", cmap=colours, vmin=0, vmax=1)
        axis.set_title(
            f"{arm['name']}  {np.nansum(grid):.0f}/{np.isfinite(grid).sum()}", loc="left", fontsize=10, color=INK
        )
        axis.set_xticks(range(len(lengths)), [f"{n:,}" for n in lengths], fontsize=8)
        shown = range(0, len(depths), max(1, len(depths) // 5))
        axis.set_yticks(list(shown), [f"{100 * depths[i]:.0f} %" for i in shown], fontsize=8)
        # White lines between the cells.
        axis.set_xticks(np.arange(len(lengths) + 1) - 0.5, minor=True)
        axis.set_yticks(np.arange(len(depths) + 1) - 0.5, minor=True)
        axis.grid(which="minor", color="white", linewidth=1.5)
        axis.grid(which="major", visible=False)
        axis.tick_params(which="both", length=0)
    for axis in axes.flat[len(arms) :]:
        axis.set_visible(False)
    figure.supxlabel("tokens of the prompt", fontsize=9, color=MUTED)
    figure.supylabel("depth of the pass key", fontsize=9, color=MUTED)
    figure.suptitle(f"{report['model_name']}: pass keys found", fontsize=12, x=0.01, ha="left")
    bar = figure.colorbar(image, ax=axes, shrink=0.6, ticks=[0, 1])
    bar.ax.set_yticklabels(["missed", "found"], fontsize=8)
    bar.outline.set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return True


def _label(axis, points: list[tuple[float, float, str, str]]) -> None:
    """Write names beside points: to the right or left, moved up or down until they cover neither names nor points."""
    axis.figure.canvas.draw()  # settles the axis' transformation
    scale = 72 / axis.figure.dpi
    frame = axis.get_window_extent()
    places = [axis.transData.transform(point[:2]) * scale for point in points]
    taken = [(x - 4, y - 4, x + 4, y + 4) for x, y in places]
    moves = [(side, step * sign) for step in range(0, 90, 3) for sign in (1, -1) for side in (1, -1)]

    def box(x: float, y: float, name: str, side: int) -> tuple[float, float, float, float]:
        width = 5.4 * len(name)
        left = x + 8 if side > 0 else x - 8 - width
        return left, y - 5, left + width, y + 5

    def free(mine: tuple[float, float, float, float]) -> bool:
        inside = mine[0] >= frame.x0 * scale and mine[2] <= frame.x1 * scale + 30 and mine[1] >= frame.y0 * scale
        return inside and not any(
            mine[0] < other[2] and other[0] < mine[2] and mine[1] < other[3] and other[1] < mine[3] for other in taken
        )

    for (x, y), (*point, name, colour) in sorted(zip(places, points), key=lambda pair: pair[0][1]):
        side, up = next((m for m in moves if free(box(x, y + m[1], name, m[0]))), (1, 0))
        taken.append(box(x, y + up, name, side))
        axis.annotate(
            name, point, xytext=(9 * side, up), textcoords="offset points", fontsize=9, color=colour, va="center",
            ha="left" if side > 0 else "right",
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.6, "shrinkA": 0} if abs(up) > 6 else None,
        )  # fmt: skip


def _pyplot():
    """matplotlib's interface without a display, in the report's style."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update(
        {
            "font.size": 10, "axes.edgecolor": FAINT, "axes.grid": True, "grid.color": FAINT, "grid.linewidth": 0.6,
            "axes.spines.top": False, "axes.spines.right": False, "xtick.color": MUTED, "ytick.color": MUTED,
        }
    )  # fmt: skip
    return plt
