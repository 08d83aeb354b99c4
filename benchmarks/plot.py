"""The plot of what FDConv costs: an SVG for the README, legible on light and dark pages."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

# Colours and greys that stand out against white and against GitHub's dark grey alike.
TEXT = "#7d8590"
BARS = {
    "eager": ("#e0703a", "as published, PyTorch"),
    "exported": ("#3b8eea", "exported, ONNX Runtime"),
    "native": ("#1f6feb", "with native operators"),
    "plain": ("#8d969e", "baseline, ONNX Runtime"),
}
WIDTH, BAR_HEIGHT = 8.6, 0.42  # inches; the README shows it about as wide


def draw(results: Sequence[dict[str, Any]]) -> str:
    """One panel per result of ``benchmarks.speed``, side by side: SVG text.

    Bars are medians, whiskers quartiles; each bar names its milliseconds and what it is of the
    published form's.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    # Text stays text: smaller, searchable, and in the reader's own font.
    style = {"svg.fonttype": "none", "svg.hashsalt": "fdconv", "font.family": "sans-serif"}
    with plt.rc_context({**style, "font.size": 11, "text.color": TEXT}):
        figure, axes = plt.subplots(
            1, len(results), figsize=(WIDTH, 0.9 + BAR_HEIGHT * len(BARS) * 1.5), squeeze=False
        )
        for axis, result in zip(axes[0], results, strict=True):
            _panel(axis, result)
        handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour, _ in BARS.values()]
        figure.legend(
            handles, [name for _, name in BARS.values()], ncols=len(BARS), frameon=False,
            loc="lower center", fontsize=10.5, handlelength=1, labelcolor=TEXT,
        )  # fmt: skip
        figure.tight_layout(rect=(0, 0.12, 1, 1), w_pad=3)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
        plt.close(figure)
    return file.getvalue()


def _panel(axis: Any, result: dict[str, Any]) -> None:
    eager = result["ms"]["eager"]["median"]
    bars = [bar for bar in BARS.items() if bar[0] in result["ms"]]
    for place, (side, (colour, _)) in enumerate(bars):
        ms = result["ms"][side]
        median = ms["median"]
        whiskers = [[median - ms["q1"]], [ms["q3"] - median]]
        axis.barh(
            -place, median, height=0.62, color=colour, xerr=whiskers,
            error_kw={"ecolor": TEXT, "elinewidth": 1, "capsize": 2},
        )  # fmt: skip
        said = f"{median:.0f} ms" + ("" if side == "eager" else f"  ({median / eager:.2f}×)")
        axis.text(ms["q3"] + eager * 0.03, -place, said, va="center", color=TEXT)
    axis.set_title(result["title"], loc="left", fontsize=12, color=TEXT)
    # Room on the right for the longest bar's label.
    axis.set_xlim(0, max(result["ms"][side]["q3"] for side, _ in bars) * 1.45)
    axis.set_yticks([])
    axis.set_xticks([])
    for spine in axis.spines.values():
        spine.set_visible(False)
    axis.axvline(0, color=TEXT, linewidth=1)
