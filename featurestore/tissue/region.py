"""What decides the tissue of one slide: a method, and the part of the slide that a mask or annotation file leaves."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featurestore.tissue.annotation import Frame, Selection, draw_selection, select_classes
from featurestore.tissue.annotation_file import AnnotationFile, annotation_fingerprint, read_annotation
from featurestore.tissue.tissue_method import DEFAULT_TISSUE


@dataclass(frozen=True)
class Region:
    """The part of a slide that a file leaves.

    Parameters
    ----------
    file
        Path or URL of a mask or of annotations.
    within, without
        Classes to take (none: all) and to leave out.
    """

    file: str
    within: tuple[str, ...] = ()
    without: tuple[str, ...] = ()

    def read(self, overview_px: tuple[int, int] | None = None) -> "ReadRegion":
        """Read the file, and choose its classes.

        Parameters
        ----------
        overview_px
            ``(width, height)`` of the overview that it will be drawn on.

        Raises
        ------
        MaskError
            If the file cannot be used, or a class is not there.
        """
        opened = read_annotation(self.file, overview_px)
        selection = select_classes(opened.annotation.classes, self.within, self.without, opened.label)
        return ReadRegion(self, opened, selection)

    def identity(self) -> dict[str, Any]:
        """Return what tells two regions apart, JSON-ready; the file is hashed, and not parsed.

        Raises
        ------
        MaskError
            If the file is not there.
        """
        return self.facts(annotation_fingerprint(self.file))

    def facts(self, fingerprint: str) -> dict[str, Any]:
        """Return the identity of the region, given the fingerprint of its file."""
        # No path: a file may be moved, and its name may be private.
        return {
            "fingerprint": fingerprint,
            "within": list(self.within),
            "without": list(self.without),
        }


@dataclass(frozen=True)
class ReadRegion:
    """A region whose file has been read."""

    region: Region
    opened: AnnotationFile
    selection: Selection

    def to_attrs(self) -> dict[str, Any]:
        """Return what a grid's attributes record, JSON-ready."""
        return {**self.region.facts(self.opened.fingerprint), "kind": self.opened.annotation.kind}

    @property
    def remarks(self) -> tuple[str, ...]:
        """What the user should know of the file."""
        return tuple(filter(None, (self.opened.annotation.remark, self.selection.remark)))

    def draw(self, frame: Frame) -> NDArray[np.bool_]:
        """Return which pixels of an overview the region holds.

        Raises
        ------
        MaskError
            If there are none, or the file does not fit the slide.
        """
        return draw_selection(self.opened.annotation, self.selection, frame, self.opened.label)


@dataclass(frozen=True)
class TissueRequest:
    """How tissue is to be found on one slide.

    Parameters
    ----------
    method
        Name of a registered `TissueMethod`.
    region
        To which part tissue is restricted; None for the whole slide.
    """

    method: str = DEFAULT_TISSUE
    region: Region | None = None
