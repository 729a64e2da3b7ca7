"""What a slide reader declares, and the registry of all of them.

A reader is one module with a ``RECORD``: in our folder ``readers``, or in any installed package that names its record
under the entry-point group ``histosge.slide_readers``. `featurestore.slides.pyramid_slide.PyramidSlide` does most of
the work of one.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

from featurestore.errors import ExtensionWarning, SlideError
from featurestore.extensions import Registry
from featurestore.slides.download_cache import is_remote
from featurestore.slides.protocol import Slide


class Recognition(IntEnum):
    """How sure a reader is that a slide is of its format."""

    NO = 0
    """It is not, or the reader would read it wrongly: it is not tried."""
    MAYBE = 1
    """Only opening tells: tried after those that are surer."""
    LIKELY = 2
    """Tried first."""
    MINE = 3
    """No reader that is less sure is tried."""


@dataclass(frozen=True)
class SlideReader:
    """One family of slide formats.

    Parameters
    ----------
    name
        A short one, as other packages register it.
    help
        One line: which formats.
    suffixes
        Ends of file names, lower case with their dot. A folder's files of these names are slides.
    open
        Opens a local path, with microns per pixel at level 0, or None for those in the file. Raises `SlideError` with
        one line for what it cannot read, and `MppError` where the scale is missing or absurd.
    order
        Readers that are equally sure are tried in this order, lowest first. Ours stand at 10 to 50.
    recognises
        Tells how sure it is, from a local path that exists: by the name, or a look at the first bytes. None: `MINE`
        for its suffixes, `NO` for others.
    open_url
        Opens a remote slide of its suffixes without fetching it. Returns None for one that has to be fetched whole.
        None: all have to be.
    is_folder
        A slide is a folder, which is never fetched.
    looks_inside
        Its suffixes are those of other files, too: in a folder, a file counts as a slide only if it is recognised.
    """

    name: str
    help: str
    suffixes: tuple[str, ...]
    open: Callable[[str, float | None], Slide]
    order: int = 60
    recognises: Callable[[str], Recognition] | None = None
    open_url: Callable[[str, float | None], Slide | None] | None = None
    is_folder: bool = False
    looks_inside: bool = False

    def __post_init__(self) -> None:
        # Checked when a package is loaded, where it is one warning; a suffix that never matches would not be noticed.
        if wrong := [
            suffix for suffix in self.suffixes if not suffix.startswith(".") or suffix.lower() != suffix
        ]:
            raise ValueError(
                f"slide reader {self.name!r}: write suffixes like '.svs', not {', '.join(wrong)}"
            )

    def has_suffix(self, source: str) -> bool:
        """Whether a path or URL ends in one of its suffixes; a URL's query does not count."""
        # Signed URLs end in a query; a local name may hold a question mark.
        path = Path(source.partition("?")[0] if is_remote(source) else source)
        if path.name.lower().endswith(self.suffixes):
            return True
        # A picture of SpatialData is a group below the folder that has the suffix.
        is_below = self.is_folder and any(part.lower().endswith(self.suffixes) for part in path.parts[:-1])
        return is_below and (not path.suffix if is_remote(source) else _is_group(path))

    def recognition(self, path: str) -> Recognition:
        """Return how sure it is that a local path is of its format."""
        if self.recognises is None:
            return Recognition.MINE if self.has_suffix(path) else Recognition.NO
        try:
            return Recognition(self.recognises(path))
        except Exception as error:
            if self.name in READERS.own:
                raise
            # Another package's reader that fails on one file must not take that file from the others.
            reason = " ".join(str(error).split())
            warnings.warn(
                f"slide reader {self.name!r} is not tried on {path}: {type(error).__name__}: {reason}",
                ExtensionWarning,
                stacklevel=2,
            )
            return Recognition.NO


def _is_group(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("zarr.json", ".zgroup"))


READERS: Registry[SlideReader] = Registry(
    "slide_readers", "featurestore.slides.readers", SlideReader, SlideError
)


def readers_in_order() -> list[SlideReader]:
    """Return all readers, in the order in which they are tried."""
    return sorted(READERS.records(), key=lambda reader: reader.order)


def is_folder_slide(source: str) -> bool:
    """Whether a path or URL names a slide that is a folder, such as an OME-Zarr."""
    return any(reader.is_folder and reader.has_suffix(source) for reader in READERS.records())


def is_slide_file(path: Path) -> bool:
    """Whether a path is a file that some reader reads, by its name."""
    return path.is_file() and any(
        reader.has_suffix(path.name)
        and not (reader.looks_inside and reader.recognition(str(path)) is Recognition.NO)
        for reader in READERS.records()
        if not reader.is_folder
    )


def slide_suffixes() -> list[str]:
    """Return the suffixes that some reader reads, sorted."""
    return sorted({suffix for reader in READERS.records() for suffix in reader.suffixes})
