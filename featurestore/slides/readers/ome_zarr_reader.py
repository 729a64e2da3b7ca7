"""OME-Zarr pictures (NGFF 0.4 and 0.5) as slides: a folder or a URL, read chunk by chunk as they are touched."""

from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from featurestore.errors import SlideError, first_line
from featurestore.location import Location, strip_credentials
from featurestore.slides.access_errors import access_error, is_access_error
from featurestore.slides.pyramid_slide import PyramidSlide, choose_mpp, isotropic_mpp
from featurestore.slides.slide_reader import SlideReader

MICRONS = {
    "angstrom": 1e-4,
    "nanometer": 1e-3,
    "micrometer": 1.0,
    "millimeter": 1e3,
    "centimeter": 1e4,
    "meter": 1e6,
}
"""Microns in a unit that NGFF knows."""


class OmeZarrSlide(PyramidSlide):
    """An 8-bit RGB multiscale image.

    Parameters
    ----------
    path
        Folder or URL of the image's group, or of a bioformats2raw group with one image in it.
    mpp
        Microns per pixel at level 0; overrides the metadata's.

    Raises
    ------
    SlideError
        If there is no multiscale image, or it is not 8-bit RGB.
    MppError
        If no scale in a known unit of length is given.
    """

    def __init__(self, path: str, mpp: float | None) -> None:
        label = strip_credentials(path)
        try:
            self._open(path, label, mpp)
        except (LookupError, TypeError, AttributeError) as error:
            raise SlideError(
                f"{label} has OME-Zarr metadata that cannot be read: {type(error).__name__}: {first_line(error)}"
            ) from error

    def _open(self, path: str, label: str, mpp: float | None) -> None:
        group, multiscale = _find_image(path, label)
        self._axes = [
            axis["name"] if isinstance(axis, dict) else str(axis) for axis in multiscale.get("axes", "tczyx")
        ]
        try:
            self._levels = [group[dataset["path"]] for dataset in multiscale["datasets"]]
        except KeyError as error:
            raise SlideError(f"{label} lacks a level that its metadata name: {error}") from error
        first = self._levels[0]
        extent = dict(zip(self._axes, first.shape, strict=False))
        # Several times or depths are several pictures: which one is the slide would be a guess.
        extra = {name: n for name, n in extent.items() if name not in "cyx" and n != 1}
        if first.dtype != np.uint8 or extent.get("c") != 3 or extra or len(self._axes) != first.ndim:
            raise SlideError(
                f"{label} is {first.dtype} with axes {extent}; a slide is 8-bit RGB, three channels"
            )
        y, x = self._axes.index("y"), self._axes.index("x")
        sizes = tuple((level.shape[x], level.shape[y]) for level in self._levels)
        super().__init__(label, sizes, *choose_mpp(mpp, lambda: _mpp(multiscale, self._axes, label), label))

    def read_level(self, level: int, x: int, y: int, width: int, height: int) -> NDArray[np.uint8]:
        """Return native RGB of a rectangle inside a level."""
        where = {"y": slice(y, y + height), "x": slice(x, x + width), "c": slice(None)}
        try:
            found = np.asarray(self._levels[level][tuple(where.get(name, 0) for name in self._axes)])
        except Exception as error:
            if not is_access_error(error) and not isinstance(error, RuntimeError):
                raise
            what = f"cannot be read at level {level}, ({x}, {y})"
            if isinstance(error, FileNotFoundError):  # a chunk; the slide was there when it was opened
                raise SlideError(f"{self.source} {what}: it is no longer there") from error
            raise access_error(self.source, error, what) from error
        order = [name for name in self._axes if name in where]
        return np.ascontiguousarray(found.transpose([order.index(name) for name in "yxc"]))

    def close(self) -> None:
        """Nothing is held open."""


def _find_image(path: str, label: str) -> tuple[Any, dict[str, Any]]:
    try:
        root = zarr.open_group(Location(path).zarr(read_only=True), mode="r")
    except Exception as error:
        if isinstance(error, (TypeError, KeyError, FileNotFoundError, ValueError)):
            raise SlideError(f"{label} is no Zarr group: {first_line(error)}") from error
        if is_access_error(error):
            raise access_error(label, error, "is no Zarr group") from error
        raise
    # bioformats2raw writes its images as groups "0", "1", ... below a root without multiscales.
    for group in (root, root.get("0")):
        if isinstance(group, zarr.Group):
            attrs: Any = dict(group.attrs)
            # 0.5 puts its metadata under "ome", 0.4 at the top.
            multiscales = attrs.get("ome", attrs).get("multiscales")
            if multiscales:
                return group, multiscales[0]
    if isinstance(pictures := root.get("images"), zarr.Group) and (names := sorted(pictures.group_keys())):
        # SpatialData. Not opened by itself where there is just one: the identity of a slide is that of its own group.
        listing = ", ".join(f"{label}/images/{name}" for name in names[:8])
        raise SlideError(f"{label} is a SpatialData, of which a slide is one picture; name it: {listing}")
    raise SlideError(f"{label} holds no OME-Zarr image (no multiscales in its attributes)")


def _mpp(multiscale: dict[str, Any], axes: list[str], label: str) -> float | None:
    units = {axis["name"]: axis.get("unit") for axis in multiscale.get("axes", []) if isinstance(axis, dict)}
    scale = np.ones(len(axes))
    transforms = multiscale["datasets"][0].get("coordinateTransformations", [])
    # NGFF applies a dataset's transformations first, then those of the whole multiscale image.
    for transform in [*transforms, *multiscale.get("coordinateTransformations", [])]:
        if transform.get("type") == "scale":
            scale = scale * np.asarray(transform["scale"], dtype=float)
    found = [
        scale[axes.index(name)] * MICRONS[str(units[name])] if units.get(name) in MICRONS else None
        for name in "xy"
    ]
    return isotropic_mpp(found[0], found[1], label)


RECORD = SlideReader(
    "ome-zarr",
    "OME-Zarr (NGFF 0.4 and 0.5), 8-bit RGB, local or remote, read in chunks",
    (".zarr",),
    OmeZarrSlide,
    50,
    open_url=OmeZarrSlide,
    is_folder=True,
)
