"""Straight lines in log-log, and how far the last point lies from them: for scaling.py."""
from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator


def line_of(x_N: np.ndarray, y_N: np.ndarray) -> tuple[float, float, float]:
    """y = factor x^exponent, by least squares of the logarithms, and their correlation."""
    log_x_N = np.log(x_N)
    log_y_N = np.log(y_N)
    exponent, offset = np.polyfit(log_x_N, log_y_N, 1)
    correlation = np.corrcoef(log_x_N, log_y_N)[0, 1]
    return exponent, np.exp(offset), correlation


def law_of(x_D: np.ndarray, y_D: np.ndarray) -> list[float]:
    """Exponent and correlation of the line through all points but the last; and by how many percent
    that one lies above it."""
    exponent, factor, correlation = line_of(x_D[:-1], y_D[:-1])
    foretold = factor * x_D[-1] ** exponent
    return [exponent, correlation, 100 * (y_D[-1] / foretold - 1)]


def draw(x_names: Sequence[str], x_AD: np.ndarray, y_names: Sequence[str], y_MD: np.ndarray):
    """A figure, in which each y is drawn against each x, with its line. The last points are red."""
    size = 4.5 * len(x_AD), 3.5 * len(y_MD)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(len(y_MD), len(x_AD))
    for row, y_name, y_D in zip(axes, y_names, y_MD):
        for axis, x_name, x_D in zip(row, x_names, x_AD):
            draw_line(axis, x_D, y_D)
            axis.set_xlabel(x_name)
            axis.set_ylabel(y_name)
            axis.yaxis.set_major_locator(MaxNLocator(6))   # of less than a decade
            axis.yaxis.set_major_formatter("{x:.2f}")
            axis.yaxis.set_minor_formatter("")
    return figure


def draw_line(axis, x_D: np.ndarray, y_D: np.ndarray) -> None:
    exponent, factor, correlation = line_of(x_D[:-1], y_D[:-1])
    label = f"exponent {exponent:.3f}, correlation {correlation:.4f}"
    axis.loglog(x_D, factor * x_D**exponent, "--", color="grey", label=label)
    axis.loglog(x_D[:-1], y_D[:-1], "o")
    axis.loglog(x_D[-1:], y_D[-1:], "s", color="red", label="held out of the fit")
    axis.legend(fontsize="small")
