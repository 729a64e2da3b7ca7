"""What an export format declares, what its `write` is given, and the registry of all formats.

A format is one module with a `RECORD`: in our folder ``formats``, or in any installed package that names its record
under the entry-point group ``histosge.exports``.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from featurestore.extensions import Registry
from featurestore.slides.protocol import Slide
from histosge.data.sections import Spots
from histosge.errors import ExportError
from histosge.exporting.patch_table import PatchTable

MAX_DOMAINS = 1000
"""Of one slide, found by k-means in a pass over all centres for each patch: more would be single patches."""


@dataclass(frozen=True)
class ExportSettings:
    """How to write, for the formats that can do it in several ways.

    Parameters
    ----------
    store
        Feature store that knows where the slides are, for pictures; None to do without.
    picture_mpp
        Microns per pixel of the picture in SpatialData.
    domains
        How many, where the map holds none; or a folder with a table of labels per slide.
    ngff
        Version of OME-Zarr.
    samples
        Sample sheet, for the formats that write measured spots beside the map.
    """

    store: str | None = None
    picture_mpp: float = 2.0  # enough to see glands; a section of 20 mm is then 10,000 pixels wide
    domains: int | Path = 7
    ngff: str = "0.4"
    samples: str | None = None

    def __post_init__(self) -> None:
        # Not below: a picture is never finer than its slide, and mistyped units give values like 1e-6.
        if not 0.01 <= self.picture_mpp <= 1000:
            raise ExportError(
                f"--picture-mpp {self.picture_mpp:g} is no scale; give microns per pixel from 0.01 to 1000, such as 2"
            )
        if isinstance(self.domains, int) and not 1 <= self.domains <= MAX_DOMAINS:
            raise ExportError(
                f"{self.domains} domains cannot be told apart; give 1 to {MAX_DOMAINS}, or a folder with tables of labels"
            )


@dataclass(frozen=True)
class ExportItem:
    """One slide to write.

    Parameters
    ----------
    table
        Its patches with their values, read on demand.
    url
        The store that the table is from.
    slide
        The slide itself, opened; None if the format does not want it, or it cannot be reached.
    spots
        Measured on the slide; None if the format does not want them, or no sample sheet names any.
    """

    table: PatchTable
    url: str
    slide: Slide | None = None
    spots: Spots | None = None


@dataclass(frozen=True)
class ExportFormat:
    """One format of another tool.

    Parameters
    ----------
    name
        What ``--to`` takes.
    help
        One line for ``--to`` and the documentation, without a full stop: what is written, and who opens it.
    suffix
        What the output of a slide ends in after the slide's id. One that ends in ``.zarr`` is a folder that must not
        exist yet; an empty one is a folder that files are written into; any other is a file, which is replaced.
    write
        Called with the slides (a single one, unless `one_for_all`), the path, and the settings. It writes the output
        whole or not at all, and returns what it wrote, in words, such as ``391 patches x 5 genes``. It raises
        `ExportError` for what it refuses.
    also
        Other suffixes that the user's OUT may have to be taken as the output itself.
    maps, embeddings
        Whether it takes expression maps, and embeddings.
    one_for_all
        Whether one output holds all slides, rather than one each.
    wants_slide
        Whether it shows the slide's pixels, so that the slide is opened for it.
    takes_empty
        Whether a slide without a single value can be written. If not, it is refused before anything is written,
        which costs one pass over the first columns of every slide.
    wants_spots
        Whether it writes measured spots, so that those of the sample sheet are read for it.
    """

    name: str
    help: str
    suffix: str
    write: Callable[[Sequence[ExportItem], Path, ExportSettings], str]
    also: tuple[str, ...] = ()
    maps: bool = True
    embeddings: bool = True
    one_for_all: bool = False
    wants_slide: bool = False
    takes_empty: bool = False
    wants_spots: bool = False

    @property
    def is_zarr(self) -> bool:
        """Whether the output of a slide is a Zarr folder."""
        return self.suffix.endswith(".zarr")

    @property
    def is_folder(self) -> bool:
        """Whether the output of a slide is a folder: of Zarr, or of files."""
        return self.is_zarr or not self.suffix


# Filled when it is first used: a format's module imports this one.
FORMATS: Registry[ExportFormat] = Registry("exports", "histosge.exporting.formats", ExportFormat, ExportError)
