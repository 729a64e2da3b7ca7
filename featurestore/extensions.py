"""Extension points: one registry for each kind of thing that can be added.

A registry is filled from two places, in the same way: the modules of one folder of ours, each of which declares
``RECORD``, and the entry points ``histosge.<kind>`` of installed packages, whose names are the records' names and
whose values are records (``package.module:RECORD``). Command-line help, tables in the documentation and error
messages are made from it.

Listing names imports nothing of other packages; a record is imported when its help or its function is needed. So a
module that declares a record keeps heavy imports inside its functions.
"""

import pkgutil
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from functools import cached_property, lru_cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from featurestore.errors import ExtensionWarning, FeatureStoreError

GROUP = "histosge."
"""What the names of all entry-point groups begin with."""
NEAREST, ALIKE = 3, 0.4
"""Names that an error message suggests at most, and how similar to the unknown one they must be (0..1)."""


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
    more
        Returns records of ours that are no modules (such as those of a table), to follow the folder's.
    adapt
        Called with the name and value of an entry point whose value is no record: returns a record made from it, or
        None if it cannot.
    """

    def __init__(
        self,
        kind: str,
        folder: str,
        record: type[R],
        error: type[FeatureStoreError],
        *,
        more: Callable[[], Iterable[R]] = tuple,
        adapt: Callable[[str, Any], R | None] | None = None,
    ) -> None:
        self.kind, self.group = kind, f"{GROUP}{kind}"
        self._plain = kind.replace("_", " ")
        self._folder, self._record, self._error = folder, record, error
        self._more, self._adapt = more, adapt
        self._refused: dict[str, str] = {}
        self._warned: set[str] = set()

    @cached_property
    def own(self) -> Mapping[str, R]:
        """Our records by name: those of the folder in the order of its modules' names, then `more`."""
        package = import_module(self._folder)
        # All modules are imported: a record cannot be known to be there before. So they have to be quick to import.
        found: dict[str, R] = {}
        for module in pkgutil.iter_modules(package.__path__):
            record = getattr(import_module(f"{self._folder}.{module.name}"), "RECORD", None)
            if isinstance(record, self._record):
                found[record.name] = record
        return found | {record.name: record for record in self._more()}

    @cached_property
    def offered(self) -> Mapping[str, EntryPoint]:
        """Entry points of installed packages by name; nothing of theirs is imported."""
        found: dict[str, EntryPoint] = {}
        # Sorted by value, so that all processes of a cluster take the same one of two with one name.
        ours = (point for point in _installed_points() if point.group == self.group)
        for point in sorted(ours, key=lambda point: (point.name, point.value)):
            if point.name in self.own:
                self._warn(point, "we have one of that name, which is used")
            elif point.name in found:
                self._warn(point, f"{_package(found[point.name])} has one of that name, which is used")
            else:
                found[point.name] = point
        return found

    def names(self) -> tuple[str, ...]:
        """Return all names: ours, then other packages'. Nothing of theirs is imported."""
        return (*self.own, *self.offered)

    def records(self) -> tuple[R, ...]:
        """Return all records that can be loaded, ours first. Each that cannot is one `ExtensionWarning`, once."""
        found = list(self.own.values())
        for point in self.offered.values():
            try:
                found.append(self._load(point))
            except _RefusedError as error:
                if point.name not in self._warned:
                    self._warned.add(point.name)
                    self._warn(point, str(error))
        return tuple(found)

    def get(self, name: str) -> R:
        """Return the record of a name.

        Raises
        ------
        FeatureStoreError
            Of the registry's class, if there is none (the nearest names are given) or it cannot be loaded (the
            reason is given).
        """
        if name in self.own:
            return self.own[name]
        if name not in self.offered:
            raise self._error(f"unknown name {name!r} among {self._plain}: {self.suggest(name)}")
        point = self.offered[name]
        try:
            return self._load(point)
        except _RefusedError as error:
            raise self._error(
                f"{self._plain}: {name!r} ({point.value}) cannot be loaded: {error}; correct or remove the package "
                f"{_package(point)}"
            ) from error

    def suggest(self, name: str) -> str:
        """Return the end of an error message: the nearest names, or all of them."""
        # In lower case, as all names are: `UNI` is near `uni`.
        near = get_close_matches(name.lower(), self.names(), n=NEAREST, cutoff=ALIKE)
        return f"did you mean {' or '.join(near)}?" if near else f"choose one of {', '.join(self.names())}"

    def refresh(self) -> None:
        """Look again at what is installed: for a session in which a package was installed after the first look."""
        vars(self).pop("offered", None)
        self._refused.clear()
        self._warned.clear()

    def _load(self, point: EntryPoint) -> R:
        # A refused one is not imported again: `records` runs for every slide, and a failing import can take seconds.
        if point.name in self._refused:
            raise _RefusedError(self._refused[point.name])
        try:
            return self._checked(point.name, point.load())
        except _RefusedError as error:
            self._refused[point.name] = str(error)
            raise
        # Whatever the import of another package raises (some call sys.exit), the rest has to work without it.
        except (Exception, SystemExit) as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            self._refused[point.name] = reason
            raise _RefusedError(reason) from error

    def _checked(self, name: str, value: Any) -> R:
        if not isinstance(value, self._record) and self._adapt is not None:
            value = self._adapt(name, value) or value
        if not isinstance(value, self._record):
            raise _RefusedError(f"it is a {type(value).__name__}, not a {self._record.__name__}")
        # One name for both: a store or a model records the record's, and it is looked up by the entry point's.
        if value.name != name:
            raise _RefusedError(f"its record is named {value.name!r}")
        return value

    def _warn(self, point: EntryPoint, reason: str) -> None:
        warnings.warn(
            f"{self.group} {point.name!r} of {_package(point)} ({point.value}) is left out: {reason}",
            ExtensionWarning,
            stacklevel=2,
        )


def _installed_points() -> tuple[EntryPoint, ...]:
    """Return the entry points of all our groups: one look at the installed packages serves every registry."""
    return _points_on(tuple(_state(Path(folder)) for folder in sys.path))


def _state(folder: Path) -> tuple[str, int]:
    # Installing or removing a package changes the time of the folder that it lies in; importlib relies on that, too.
    try:
        return str(folder.absolute()), folder.stat().st_mtime_ns
    except (OSError, ValueError):
        return str(folder), 0


# A few: an environment of tests puts folders on the path and takes them away again.
@lru_cache(maxsize=4)
def _points_on(path: tuple[tuple[str, int], ...]) -> tuple[EntryPoint, ...]:
    found = entry_points()
    ours = (group for group in found.groups if group.startswith(GROUP))
    return tuple(point for group in ours for point in found.select(group=group))


class _RefusedError(Exception):
    """Why an entry point gives no record."""


def _package(point: EntryPoint) -> str:
    return point.dist.name if point.dist is not None else point.value.partition(":")[0]
