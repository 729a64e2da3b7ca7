"""The list of file names that a store made with ``--private`` does not hold: on the machine of the user who embedded it.

It is a sample sheet (slide id, path of the slide, and what else the user's sheet said), so `train` and `view --samples`
take it as it is. The store's root holds a random token, and the list is named by it: the store may be moved or copied.
"""

import csv
import fcntl
import os
import secrets
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

from featurestore.credentials import strip_credentials
from featurestore.errors import AccessError, SlideError, StoreError
from featurestore.slides.fingerprint import slide_fingerprint
from featurestore.slides.sample_sheet import Sample
from featurestore.slides.sheet_listing import SheetListing, write_sheet
from featurestore.whole_file import whole_file

ENV_FOLDER = "HISTOSGE_PRIVATE"
ID_BYTES = 6
"""Random bytes of a slide id. Two of 10,000 slides get the same one in one of 6 million runs; then another is drawn."""
_COLUMNS = ("expression", "mpp", "donor", "mask")


def private_folder() -> Path:
    """Return where the lists lie: ``$HISTOSGE_PRIVATE``, or the user's folder for data.

    Raises
    ------
    StoreError
        If the user has no home: a list in a temporary folder would be lost.
    """
    if os.environ.get(ENV_FOLDER):
        return Path(os.environ[ENV_FOLDER])
    if os.environ.get("XDG_DATA_HOME"):
        return Path(os.environ["XDG_DATA_HOME"]) / "histosge" / "private"
    try:
        home = Path.home()
    except RuntimeError as error:
        raise StoreError(
            f"--private keeps file names on this machine, and this user has no home; set {ENV_FOLDER} to a folder"
        ) from error
    return home / ".local" / "share" / "histosge" / "private"


def new_token() -> str:
    """Return a token for a new store."""
    return secrets.token_hex(16)


@dataclass(frozen=True)
class PrivateMap:
    """The slides of one private store, by id.

    Parameters
    ----------
    token
        Of the store: 32 hexadecimal digits.
    """

    token: str

    @property
    def file(self) -> Path:
        """Where the list lies; it may not be there."""
        return private_folder() / f"{self.token}.csv"

    @cached_property
    def sources(self) -> dict[str, str]:
        """Slide id -> path or URL, as the list says when it is first looked at; empty without a list."""
        try:
            return {row["slide_id"]: row["slide"] for row in self._rows()}
        except StoreError:  # without a home or without access the slides are only not found
            return {}

    def name_samples(self, samples: Sequence[Sample], stored: Iterable[tuple[str, str]] = ()) -> list[Sample]:
        """Give slides ids that say nothing, unless the sheet names them; the same slide gets the same id again.

        Parameters
        ----------
        samples
            As they are read from a folder or sheet.
        stored
            ``(slide id, fingerprint)`` of what the store holds, read only where there is no list: it is made again.

        Returns
        -------
        list of Sample
            In the same order. The list is written before this returns.
        """
        with self._locked():
            rows = self._rows()
            known = {row["slide"]: row["slide_id"] for row in rows}
            if not rows:
                known = _found_again(samples, stored)
            taken = {*known.values(), *(row["slide_id"] for row in rows)}
            named = [_name(sample, known, taken) for sample in samples]
            fresh = {sample.slide_id: _row(sample) for sample in named}
            kept = [row for row in rows if row["slide_id"] not in fresh]
            self._write([*kept, *fresh.values()])
        return named

    def look_up(self, samples: Sequence[Sample]) -> list[Sample]:
        """Return slides under the ids that the list holds; others are named by their place in the run. It writes nothing."""
        known = {path: slide_id for slide_id, path in self.sources.items()}
        return number_samples(samples, known)

    def _rows(self) -> list[dict[str, str]]:
        try:
            with self.file.open(encoding="utf-8", newline="") as file:
                return list(csv.DictReader(file))
        except FileNotFoundError:
            return []
        except OSError as error:
            raise AccessError(
                f"{self.file} cannot be read: {error.strerror}; it is the list of file names of --private"
            ) from error

    def _write(self, rows: list[dict[str, str]]) -> None:
        try:
            with whole_file(self.file) as partial:
                # Before anything stands in it, whatever the umask is.
                partial.touch(mode=0o600)
                write_sheet(SheetListing(tuple(rows)), self.file, partial)
        except OSError as error:
            raise AccessError(
                f"{self.file} cannot be written: {error.strerror}; it holds the file names of --private, set {ENV_FOLDER} "
                "to another folder"
            ) from error

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the list of this store: jobs that share a store add their slides one after another."""
        folder = private_folder()
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            descriptor = os.open(folder / f"{self.token}.lock", os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise AccessError(
                f"{folder} cannot be written to: {error.strerror}; --private keeps file names there, set {ENV_FOLDER} to "
                "another folder"
            ) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


def number_samples(samples: Sequence[Sample], known: dict[str, str] | None = None) -> list[Sample]:
    """Return slides named by their place in the run, for a dry run, which writes no list."""
    known = known or {}
    return [
        _renamed(sample, sample.slide_id if sample.is_named else known.get(_path(sample), f"slide-{number}"))
        for number, sample in enumerate(samples, start=1)
    ]


def _path(sample: Sample) -> str:
    return strip_credentials(sample.slide)


def _name(sample: Sample, known: dict[str, str], taken: set[str]) -> Sample:
    slide_id = sample.slide_id if sample.is_named else known.get(_path(sample))
    while slide_id is None:
        drawn = f"slide-{secrets.token_hex(ID_BYTES)}"
        slide_id = None if drawn in taken else drawn
    taken.add(slide_id)
    return _renamed(sample, slide_id)


def _renamed(sample: Sample, slide_id: str) -> Sample:
    donor = slide_id if sample.donor == sample.slide_id else sample.donor
    return replace(sample, slide_id=slide_id, donor=donor, is_private=True)


def _row(sample: Sample) -> dict[str, str]:
    values = asdict(sample)
    texts = {name: "" if values[name] is None else strip_credentials(str(values[name])) for name in _COLUMNS}
    return {"slide_id": sample.slide_id, "slide": _path(sample), **texts}


def _found_again(samples: Sequence[Sample], stored: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Return the ids of slides that the store holds already, by their paths: slow, as it reads of each file."""
    ids = {fingerprint: slide_id for slide_id, fingerprint in stored}
    found: dict[str, str] = {}
    for sample in samples if ids else ():
        try:
            slide_id = ids.pop(slide_fingerprint(sample.slide), None)
        except SlideError:  # it fails when its turn comes
            continue
        if slide_id is not None:
            found[_path(sample)] = slide_id
    return found
