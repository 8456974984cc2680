"""A report of `drex bench`, asked what its page wants to know, and how numbers are written. Any may be missing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from drex.comparison.fields import dig, real

POLICIES = (
    "drex",
    "drex+run-ahead",
    "drex+lossless",
    "full",
    "split",
    "art",
    "consensus",
    "majority",
    "greedy",
    "latency_only",
)
"""In the order of the charts; a policy's place decides its colour and marker, the same on every page."""
DASH, TIMES_SIGN = "\u2013", "\u00d7"
NONE = DASH
TIMES = ("mean", "p50", "p95", "p99")


def reals(values: Any) -> list[float]:
    """The finite numbers among them."""
    return [found for found in map(real, values or ()) if found is not None]


def number(value: Any) -> str:
    """About three digits that say something: 1,406, 85.2, 3.14, 0.0123."""
    found = real(value)
    if found is None:
        return NONE
    size = abs(found)
    return f"{found:,.{0 if size >= 99.95 else 1 if size >= 9.995 else 2}f}" if size >= 1 else f"{found:.3g}"


def times(value: float) -> str:
    """A factor."""
    return f"{value:.2f}{TIMES_SIGN}"


def count(value: Any) -> str:
    """A whole number."""
    found = real(value)
    return NONE if found is None else f"{found:,.0f}"


def percent(value: Any) -> str:
    """A share."""
    found = real(value)
    return NONE if found is None else f"{100 * found:.1f} %"


def fine(value: Any) -> str:
    """Four places, for what differs in the third."""
    found = real(value)
    return NONE if found is None else f"{found:.4f}"


def several(values: Any) -> str:
    """Numbers side by side."""
    return " · ".join(number(one) for one in values or ()) or NONE


def plain(value: Any) -> str:
    """Anything from the report's head, as it stands."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {plain(one)}" for key, one in value.items() if one is not None) or NONE
    if isinstance(value, list | tuple):
        return ", ".join(plain(one) for one in value) or NONE
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.6g}"
    return NONE if value is None or value == "" else str(value)


@dataclass(frozen=True)
class Story:
    """A report, asked the questions that the charts have."""

    report: dict[str, Any]
    runs: Sequence[dict[str, Any]]
    policies: Sequence[str]

    @classmethod
    def of(cls, report: dict[str, Any]) -> Story:
        found = {str(run["policy"]) for run in report.get("runs") or ()}
        policies = [name for name in POLICIES if name in found] + sorted(found - set(POLICIES))
        order = {name: place for place, name in enumerate(policies)}
        runs = sorted(report.get("runs") or (), key=lambda run: (order[str(run["policy"])], run["in_flight"]))
        return cls(report, runs, policies)

    @property
    def trained(self) -> bool:
        return bool(self.report.get("label") == "trained model")

    def look(self, policy: str) -> tuple[str, int]:
        """Colour and marker."""
        known = [*POLICIES, *(name for name in self.policies if name not in POLICIES)].index(policy)
        return f"var(--c{known % 8})", known

    def having(self, way: str) -> dict[str, list[dict[str, Any]]]:
        """Runs with a number there, by policy."""
        groups = {
            p: [r for r in self.runs if str(r["policy"]) == p and real(r, way) is not None] for p in self.policies
        }
        return {policy: runs for policy, runs in groups.items() if runs}

    def drafting(self) -> dict[str, list[dict[str, Any]]]:
        """Runs under run-ahead by policy, of the policies that started any row on a tentative token."""
        groups = self.having("run_ahead.drafted")
        return {name: runs for name, runs in groups.items() if any(real(run, "run_ahead.drafted") for run in runs)}

    def widest(self, has: Callable[[dict[str, Any]], object]) -> list[dict[str, Any]]:
        """Of the runs that have it, those at the largest in-flight count."""
        found = [run for run in self.runs if has(run)]
        return [run for run in found if run["in_flight"] == max(run["in_flight"] for run in found)]

    def depths(self) -> list[str]:
        """Exit layers and the full depth, as the runs name them."""
        found = {key for run in self.runs for key in (run.get("exits") or {})}
        return sorted(found, key=lambda key: (not key.isdigit(), int(key) if key.isdigit() else 0, key))

    def segments(self) -> list[str]:
        """What to call each segment."""
        most = max((len(dig(run, "time.segments") or ()) for run in self.runs), default=0)
        ends = [0, *(self.report.get("exit_layers") or ()), self.report.get("num_layers")]
        if len(ends) != most + 1 or None in ends:
            return [f"segment {index}" for index in range(most)]
        return [f"layers {first + 1}{DASH}{last}" for first, last in pairwise(ends)]

    @property
    def rate(self) -> str:
        """What full depth, θ* and the ideal compare with: they know no prompts, so decoding alone where it is known."""
        return "decode_tokens_per_s" if self.having("decode_tokens_per_s") else "tokens_per_s"

    def full_depth(self, run: dict[str, Any], way: str) -> float | None:
        """Full depth's throughput beside a run: the policy `full` where it ran, or what the run itself says."""
        ran = [r for r in self.runs if r["policy"] == "full" and r["in_flight"] == run["in_flight"]]
        return real(ran[0], way) if ran else real(run, "full") if way == self.rate else None
