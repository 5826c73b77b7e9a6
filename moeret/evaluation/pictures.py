"""The report's pictures, as SVG. The only importer of matplotlib, which the extra `report` brings."""

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from jaxtyping import Float

try:
    import matplotlib
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
except ImportError as missing:  # told where it is known what for
    raise ImportError(f"{missing}; run pip install 'moeret[report]'") from None

_STYLE = {
    "svg.hashsalt": "moeret",
    "svg.fonttype": "none",
    "font.size": 9,
    "font.family": "sans-serif",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}
_MARKS = "osv^<>DPX*"


@contextmanager
def _drawn(into: list[str], width: float, height: float, columns: int = 1) -> Iterator[Sequence[Axes]]:
    """Axes side by side, whose picture is appended to `into`."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure.subplots(1, columns, squeeze=False)[0]
        raw = io.StringIO()
        figure.savefig(raw, format="svg", metadata={"Date": None, "Creator": None})
        into.append(re.sub(r"^.*?(?=<svg)", "", raw.getvalue(), flags=re.DOTALL))


def _colour(number: int) -> Any:
    return matplotlib.colormaps["tab10"](number % 10)


def curves(losses: Mapping[str, Sequence[tuple[int, float]]], dev: Mapping[str, Sequence[tuple[int, float]]]) -> str:
    """Loss and dev nDCG@10 of each expert by step."""
    out: list[str] = []
    with _drawn(out, 9, 3.2, 2) as (left, right):
        for number, (name, points) in enumerate(losses.items()):
            steps, values = np.array(points).T
            width = max(1, len(values) // 25)
            smooth = np.convolve(values, np.ones(width) / width, mode="valid")
            left.plot(steps[len(steps) - len(smooth) :], smooth, color=_colour(number), label=name, linewidth=1.2)
        for number, name in enumerate(losses):
            if name in dev:
                right.plot(
                    *np.array(dev[name]).T, marker=_MARKS[number % 10], markersize=3, color=_colour(number), label=name
                )
        left.set(xlabel="step", ylabel="loss, smoothed", yscale="log")
        right.set(xlabel="step", ylabel="nDCG@10 on dev")
        right.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    return out[0]


def bars(groups: Sequence[str], series: Mapping[str, Sequence[float]], label: str) -> str:
    """A bar for each group and series; nan leaves one out."""
    out: list[str] = []
    with _drawn(out, max(4.5, 0.9 * len(groups) + 1.5), 3) as (axes,):
        width = 0.8 / len(series)
        for number, (name, values) in enumerate(series.items()):
            places = np.arange(len(groups)) + (number - (len(series) - 1) / 2) * width
            axes.bar(places, values, width, label=name, color=_colour(number))
        axes.set_xticks(np.arange(len(groups)), groups, rotation=30, ha="right")
        axes.set(ylabel=label)
        axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    return out[0]


def confusion(rows: Sequence[str], columns: Sequence[str], shares: Float[np.ndarray, "R C"]) -> str:
    """Which share of each row's queries went to each column."""
    out: list[str] = []
    with _drawn(out, 0.55 * len(columns) + 2.2, 0.42 * len(rows) + 1.6) as (axes,):
        axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
        for row, column in np.argwhere(shares >= 0.005):
            dark = shares[row, column] > 0.6
            axes.text(
                column,
                row,
                f"{shares[row, column]:.0%}",
                ha="center",
                va="center",
                fontsize=7,
                color="white" if dark else "black",
            )
        axes.set_xticks(np.arange(len(columns)), columns, rotation=30, ha="right")
        axes.set_yticks(np.arange(len(rows)), rows)
        axes.set(xlabel="most probable expert", ylabel="the query's domain")
        axes.spines[:].set_visible(False)
    return out[0]


def calibration(said: Sequence[float], true: Sequence[float], counts: Sequence[int]) -> str:
    """How often the router was right, by how sure it was."""
    out: list[str] = []
    with _drawn(out, 3.6, 3.2) as (axes,):
        axes.plot([0, 1], [0, 1], color="0.7", linewidth=1)
        axes.scatter(
            said, true, s=20 + 180 * np.sqrt(np.array(counts) / max(1, sum(counts))), color=_colour(0), alpha=0.8
        )
        axes.set(
            xlabel="probability of the most probable expert",
            ylabel="share that was right",
            xlim=(0, 1.02),
            ylim=(0, 1.04),
        )
    return out[0]


def lengths(tokens: Mapping[str, Sequence[int]], edges: Sequence[int]) -> str:
    """Histograms of the lengths of texts, with the edges that training padded to."""
    out: list[str] = []
    most = max(max(own) for own in tokens.values())
    with _drawn(out, 9, 2.6, len(tokens)) as all_axes:
        for number, (axes, (name, own)) in enumerate(zip(all_axes, tokens.items(), strict=True)):
            axes.hist(own, bins=np.unique(np.geomspace(1, most + 1, 40).astype(int)), color=_colour(number))
            for edge in edges:
                axes.axvline(edge, color="0.3", linewidth=0.7, linestyle=":")
            axes.set(title=name, xlabel="tokens", xscale="log")
            axes.set_xticks([2, 8, 32, 128, 512], ["2", "8", "32", "128", "512"])
            axes.minorticks_off()
        all_axes[0].set(ylabel="texts")
    return out[0]


def plane(points: Mapping[str, Float[np.ndarray, "_ 2"]]) -> str:
    """Documents on two axes, by domain."""
    out: list[str] = []
    with _drawn(out, 7.5, 4.6) as (axes,):
        for number, (name, own) in enumerate(points.items()):
            axes.scatter(
                *own.T,
                s=5,
                alpha=0.5,
                color=_colour(number),
                marker=_MARKS[number // 10 % len(_MARKS)],
                label=name,
                linewidths=0,
            )
        axes.set(xticks=[], yticks=[], xlabel="first principal component", ylabel="second")
        axes.legend(fontsize=7, markerscale=3, loc="center left", bbox_to_anchor=(1, 0.5))
    return out[0]
