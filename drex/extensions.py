"""What drex can be extended with: exit criteria and rebatching policies, looked up by name.

Those of drex itself, those that `register_criterion` and `register_policy` are given, and those that installed packages
name as entry points of the groups `drex.criteria` and `drex.policies` all come from here. See docs/extending.md.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import cache
from importlib import import_module, metadata
from typing import Any, Generic, TypeVar

from drex.errors import SettingError

T = TypeVar("T")


class Registry(Generic[T]):
    """Classes by name, imported when they are first asked for.

    Args:
        kind: what they are, for error messages: as in "policy".
        group: of the entry points by which packages name theirs.
        built_in: where those of drex are, as in "drex.control.policy.rebatching:Drex".
    """

    def __init__(self, kind: str, group: str, built_in: Mapping[str, str]) -> None:
        self.kind, self._group = kind, group
        self._places = dict(built_in)
        self._classes: dict[str, type[T]] = {}

    def names(self) -> tuple[str, ...]:
        """All that can be asked for: drex's own first."""
        return tuple(dict.fromkeys([*self._places, *self._classes, *_entry_points(self._group)]))

    def register(self, name: str, extension: type[T]) -> None:
        """Offer a class under a name; raises ValueError where another one has it."""
        if name in self.names() and self._classes.get(name) is not extension:
            raise ValueError(f"{self.kind} {name!r} is taken: choose another name")
        if not name.isidentifier():
            raise ValueError(f"{self.kind} {name!r}: choose a name of letters, digits and _")
        self._classes[name] = extension

    def check(self, name: str) -> str:
        """The name as given; raises ValueError for an unknown one."""
        if name not in self.names():
            raise SettingError(self.kind, f"{self.kind} {name!r}: choose one of {', '.join(self.names())}")
        return name

    def get(self, name: str) -> type[T]:
        """The class of a name.

        Raises:
            ValueError: an unknown name, or a package's extension that can't be imported.
        """
        self.check(name)
        if name not in self._classes:
            place = self._places.get(name) or _entry_points(self._group)[name]
            module, _, attribute = place.partition(":")
            try:
                self._classes[name] = getattr(import_module(module), attribute)
            except (ImportError, AttributeError) as error:
                raise ValueError(f"{self.kind} {name!r} can't be imported from {place} ({error})") from error
        return self._classes[name]

    def check_parameters(self, name: str, parameters: Mapping[str, Any], arguments: int = 0) -> None:
        """Raise SettingError for an unknown name, or a parameter that its class does not have.

        Args:
            name: of the class.
            parameters: the user's, by keyword.
            arguments: how many others come before these.
        """
        known = [each.name for each in list(inspect.signature(self.get(name)).parameters.values())[arguments:]]
        unknown = sorted(set(parameters) - set(known))
        if unknown:
            takes = f"it takes {', '.join(known)}" if known else "it takes none"
            message = f"{self.kind} {name!r} has no parameter {', '.join(unknown)}: {takes}"
            raise SettingError(f"{self.kind}_parameters", message)

    def make(self, name: str, parameters: Mapping[str, Any], *arguments: Any) -> T:
        """An object of a name's class.

        Args:
            name: of the class.
            parameters: the user's, by keyword.
            arguments: that come before these.

        Raises:
            ValueError: an unknown name or parameter, or a value that the class refuses.
        """
        self.check_parameters(name, parameters, len(arguments))
        return self.get(name)(*arguments, **parameters)


@cache
def _entry_points(group: str) -> dict[str, str]:
    """Where installed packages have their extensions, by name."""
    return {each.name: each.value for each in metadata.entry_points(group=group)}


POLICIES: Registry[Any] = Registry(
    "policy",
    "drex.policies",
    {
        "drex": "drex.control.policy.rebatching:Drex",
        "split": "drex.control.policy.base:Split",
        "full": "drex.control.policy.base:Split",
        "art": "drex.comparison.baselines:Art",
        "consensus": "drex.comparison.baselines:Consensus",
        "majority": "drex.comparison.baselines:Majority",
        "greedy": "drex.comparison.baselines:Greedy",
        "latency_only": "drex.comparison.baselines:LatencyOnly",
    },
)
CRITERIA: Registry[Any] = Registry(
    "criterion",
    "drex.criteria",
    {
        "max_prob": "drex.compute.criteria:MaxProb",
        "margin": "drex.compute.criteria:Margin",
        "entropy": "drex.compute.criteria:Entropy",
        "state": "drex.compute.criteria:State",
        "patience": "drex.compute.criteria:Patience",
        "probe": "drex.compute.criteria:Probe",
        "trace": "drex.comparison.trace:Trace",
    },
)


def register_policy(name: str, policy: type[Any]) -> None:
    """Offer a rebatching policy as `policy=name`: a subclass of `drex.control.policy.base.Policy`."""
    POLICIES.register(name, policy)


def register_criterion(name: str, criterion: type[Any]) -> None:
    """Offer an exit criterion as `EarlyExit(criterion=name)`: a subclass of `drex.compute.criteria.Criterion`.

    Raises:
        ValueError: a name that is taken, or numbers that heads don't measure.
    """
    unknown = sorted(set(criterion.needs) - set(MEASURED))
    if unknown:
        raise ValueError(f"criterion {name!r} needs {', '.join(unknown)}: heads measure {', '.join(MEASURED)}")
    CRITERIA.register(name, criterion)


MEASURED = ("second", "mean", "cosine", "probed", "agreeing")
"""What a criterion may need of each row beyond `argmax`, `best` and `log_sum_exp`; see `compute.criteria.Measured`."""
