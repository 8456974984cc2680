"""What the subcommands share: option texts and parsing of lists."""

from __future__ import annotations

EXIT_LAYERS_HELP = "Exit points: comma-separated counts of layers executed, as in 4,8."


def parse_ints(text: str, option: str) -> tuple[int, ...]:
    """'4,8' -> (4, 8); raises ValueError naming the option."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"{option} {text!r}: give whole numbers separated by commas, as in 4,8") from None


def parse_floats(text: str, option: str) -> tuple[float, ...]:
    """'0.5,0.7' -> (0.5, 0.7); raises ValueError naming the option."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"{option} {text!r}: give numbers separated by commas, as in 0.5,0.7") from None
