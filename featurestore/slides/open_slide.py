"""One way to look at any slide: size, scale, levels, and pixels at any mpp.

Terms
    size_px     (width, height) at level 0
    mpp         microns per pixel at level 0
    level_px    (width, height) of each stored level, finest first
"""

from collections.abc import Callable
from io import BufferedReader
from pathlib import Path

from featurestore.errors import MppError, SlideError, SlideNotFoundError, first_line
from featurestore.slides.protocol import Slide


def open_slide(path: str, mpp: float | None = None) -> Slide:
    """Open a slide with whichever reader knows it.

    Parameters
    ----------
    path
        A file, or a URL that fsspec knows: JPEG-tiled TIFF and SVS (of a URL the tiles that are needed;
        other formats are fetched whole); other SVS and TIFF, NDPI, MRXS, DICOM through OpenSlide; flat and
        OME-TIFF through tifffile; PNG and JPEG.
        A folder or URL that ends in ``.zarr``: OME-Zarr, read where it lies.
    mpp
        Microns per pixel at level 0; overrides what the file says.

    Raises
    ------
    SlideNotFoundError
        If there is no such file.
    MppError
        If mpp is neither given nor in the file, or absurd.
    SlideError
        If no reader can open it; the message holds each one's reason.
    """
    from featurestore.slides.download_cache import fetch, is_remote
    from featurestore.slides.readers.jpeg_tile_reader import JpegTileSlide
    from featurestore.slides.readers.ome_zarr_reader import SUFFIX, OmeZarrSlide
    from featurestore.slides.readers.openslide_reader import OpenSlideSlide
    from featurestore.slides.readers.raster_reader import SUFFIXES, RasterSlide
    from featurestore.slides.readers.tiff_reader import TiffSlide, is_ome

    if path.rstrip("/").lower().endswith(SUFFIX):
        return OmeZarrSlide(path.removeprefix("file://"), mpp)
    if is_remote(path) and (found := _open_in_parts(path, mpp)) is not None:
        return found
    file = str(fetch(path)) if is_remote(path) else path.removeprefix("file://")
    if not Path(file).is_file():
        raise SlideNotFoundError(f"there is no slide at {file}")
    suffix = Path(file).suffix.lower()
    readers: list[Callable[[str, float | None], Slide]] = [OpenSlideSlide, TiffSlide]
    if suffix in SUFFIXES:
        readers = [RasterSlide]
    elif suffix in (".tif", ".tiff") and is_ome(file):
        readers.reverse()  # OpenSlide would take it as a plain TIFF, without mpp or pyramid
    elif suffix in (".svs", ".tif", ".tiff"):
        readers.insert(0, JpegTileSlide)
    reasons = []
    for reader in readers:
        try:
            return reader(file, mpp)
        except MppError:
            raise
        except SlideError as error:
            reasons.append(first_line(error)[:120])
    raise SlideError(f"{file} cannot be opened: {'; '.join(dict.fromkeys(reasons))}")


def _open_in_parts(url: str, mpp: float | None) -> Slide | None:
    """Open a remote slide of JPEG tiles without fetching it; None if it is none, or its server serves no parts."""
    from featurestore.slides.range_reader import RangedFile, SparseCopy
    from featurestore.slides.readers.jpeg_tile_reader import JpegTileSlide
    from featurestore.slides.readers.tiff_reader import is_ome

    suffix = Path(url.partition("?")[0]).suffix.lower()
    if suffix not in (".svs", ".tif", ".tiff"):
        return None
    try:
        remote = RangedFile(url)
        with SparseCopy(remote, suffix) as copy:
            directories = BufferedReader(copy, 256 << 10)
            if is_ome(directories):
                return None
            return JpegTileSlide(
                str(copy.path), mpp, remote=remote, directories=directories, source=remote.label
            )
    except (MppError, SlideNotFoundError):
        raise
    except SlideError:
        return None
