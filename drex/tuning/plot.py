"""The picture of a training run's losses."""

from __future__ import annotations

from pathlib import Path

from drex.text_files import read_json_lines


def plot_losses(log: Path, picture: Path) -> None:
    """Draw the training losses; needs matplotlib, which the `train` extra installs, and is left out without it.

    Args:
        log: a JSON object a line, with `tokens` and losses in nats a token.
        picture: file to write.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    records = read_json_lines(log)
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for key in sorted({key for record in records for key in record} - {"step", "tokens"}):
        points = [(record["tokens"] / 1e6, record[key]) for record in records if key in record]
        label = "final" if key == "loss" else key.replace("_", " after layer ")
        axes.plot(*zip(*points, strict=True), label=label, lw=0.8)
    axes.set(xlabel="tokens seen (millions)", ylabel="training loss (nats a token)", yscale="log")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(picture, dpi=150)
