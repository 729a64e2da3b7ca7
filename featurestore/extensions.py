"""Extension points: one registry for each kind of thing that can be added.

A registry is filled from two places, in the same way: the modules of one folder of ours, each of which declares
``RECORD``, and the entry points ``histosge.<kind>`` of installed packages, whose names are the records' names and
whose values are records (``package.module:RECORD``). Command-line help, tables in the documentation and error
messages are made from it.

Listing names imports nothing of other packages; a record is imported when its help or its function is needed. So a
module that declares a record keeps heavy imports inside its functions.
"""

import pkgutil
import warnings
from collections.abc import Mapping
from difflib import get_close_matches
from functools import cached_property
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Generic, Protocol, TypeVar

from featurestore.errors import ExtensionWarning, FeatureStoreError

GROUP = "histosge."
"""What the names of all entry-point groups begin with."""
NEAREST, ALIKE = 3, 0.4
"""Names that an error message suggests at most, and how like the asked one they must be (0..1)."""


class Record(Protocol):
    """What every kind of record has."""

    @property
    def name(self) -> str:
        """Return what a user types."""
        ...

    @property
    def help(self) -> str:
        """Return one line for help and documentation."""
        ...


R = TypeVar("R", bound=Record)


class Registry(Generic[R]):
    """The records of one kind.

    Parameters
    ----------
    kind
        Plural, as in the entry-point group ``histosge.<kind>``.
    folder
        The package whose modules declare ours.
    record
        The class that a record is an instance of.
    error
        Raised for unknown names.
    """

    def __init__(self, kind: str, folder: str, record: type[R], error: type[FeatureStoreError]) -> None:
        self.kind, self.group = kind, f"{GROUP}{kind}"
        self._folder, self._record, self._error = folder, record, error
        self._refused: set[str] = set()

    @cached_property
    def own(self) -> Mapping[str, R]:
        """Our records by name, in the order of their modules' names."""
        package = import_module(self._folder)
        found: dict[str, R] = {}
        for module in pkgutil.iter_modules(package.__path__):
            record = getattr(import_module(f"{self._folder}.{module.name}"), "RECORD", None)
            if isinstance(record, self._record):
                found[record.name] = record
        return found

    @cached_property
    def offered(self) -> Mapping[str, EntryPoint]:
        """What installed packages offer, by name; nothing of theirs is imported."""
        points = {point.name: point for point in entry_points(group=self.group)}
        for name in sorted(set(points) & set(self.own)):
            self._warn(points.pop(name), "we have one of that name, which is used")
        return points

    def names(self) -> tuple[str, ...]:
        """Return all names: ours, then other packages'."""
        return (*self.own, *self.offered)

    def records(self) -> tuple[R, ...]:
        """Return all records that can be loaded; each that cannot is one warning."""
        others = (self._load(point) for point in self.offered.values())
        return (*self.own.values(), *(record for record in others if record is not None))

    def get(self, name: str) -> R:
        """Return the record of a name.

        Raises
        ------
        FeatureStoreError
            Of the registry's class, if there is none (the nearest names are given) or it cannot be loaded.
        """
        if name in self.own:
            return self.own[name]
        if name in self.offered:
            record = self._load(self.offered[name])
            if record is not None:
                return record
            raise self._error(f"{self.kind}: {name!r} cannot be loaded; mend or remove {self._package(name)}")
        raise self._error(f"unknown name {name!r} among {self.kind}: {self.suggest(name)}")

    def suggest(self, name: str) -> str:
        """Return the end of an error message: the nearest names, or all of them."""
        near = get_close_matches(name.lower(), self.names(), n=NEAREST, cutoff=ALIKE)
        return f"did you mean {' or '.join(near)}?" if near else f"choose one of {', '.join(self.names())}"

    def _load(self, point: EntryPoint) -> R | None:
        if point.name in self._refused:
            return None
        try:
            record = point.load()
        except Exception as error:  # noqa: BLE001 -- other people's code: whatever it raises, the rest works without it
            self._warn(point, f"{type(error).__name__}: {error}")
            return None
        if not isinstance(record, self._record):
            self._warn(point, f"it is a {type(record).__name__}, not a {self._record.__name__}")
            return None
        if record.name != point.name:
            self._warn(point, f"its record is named {record.name!r}")
            return None
        return record

    def _warn(self, point: EntryPoint, why: str) -> None:
        self._refused.add(point.name)
        reason = " ".join(why.split())
        warnings.warn(
            f"{self.group} {point.name!r} ({point.value}) is left out: {reason}",
            ExtensionWarning,
            stacklevel=2,
        )

    def _package(self, name: str) -> str:
        point = self.offered[name]
        return point.dist.name if point.dist is not None else point.value
