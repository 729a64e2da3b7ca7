"""How tissue is found on each slide of a run: from the settings, the sheet's column mask, and a folder of masks."""

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

from featurestore.errors import MaskError, SlideWarning, TissueError
from featurestore.slides.sample_sheet import Sample
from featurestore.tissue.annotation_file import masks_by_slide
from featurestore.tissue.region import Region, TissueRequest
from featurestore.tissue.tissue_method import DEFAULT_TISSUE, TISSUE_METHODS
from featurestore.wording import counted

MASK = "mask"
"""The method that takes the area of a file as tissue: what a slide with a mask gets where no method is named."""


class TissueSettings(Protocol):
    """What `EmbedSettings` holds of tissue."""

    @property
    def tissue(self) -> str | None:
        """Return the name of the method; None for the mask of a slide that has one, else the default method."""
        ...

    @property
    def masks(self) -> str | None:
        """Return the folder of masks."""
        ...

    @property
    def within(self) -> tuple[str, ...]:
        """Return the classes to which tissue is restricted."""
        ...

    @property
    def without(self) -> tuple[str, ...]:
        """Return the classes that are left out."""
        ...


def check_tissue(settings: TissueSettings) -> None:
    """Refuse an unknown tissue method, and masks that nothing would use.

    Raises
    ------
    TissueError
        With the fix.
    """
    if settings.tissue is None:
        return
    record = TISSUE_METHODS.get(settings.tissue)
    if settings.masks is not None and not (record.needs_region or settings.within or settings.without):
        raise TissueError(
            f"--mask is not used by --tissue {settings.tissue}; leave one of them out, or restrict tissue to classes of the "
            "masks with --within"
        )


def with_masks(rows: Sequence[Sample], settings: TissueSettings) -> list[Sample]:
    """Return the slides of a run with their masks from the folder of masks, if there is one.

    A `SlideWarning` says so where a column of masks is not used, or used for some of the slides only.

    Raises
    ------
    MaskError
        If the folder holds no masks, or none for any slide of the run.
    """
    if settings.masks is not None:
        found = masks_by_slide(settings.masks, [row.slide_id for row in rows])
        if rows and not found:
            raise MaskError(
                f"--mask holds no file for any of the {len(rows)} slides, such as {rows[0].slide_id}.png or "
                f"{rows[0].slide_id}.geojson; name masks by slide id"
            )
        return [replace(row, mask=found.get(row.slide_id)) for row in rows]
    n_masks = sum(row.mask is not None for row in rows)
    if n_masks and settings.tissue is not None and not _uses_masks(settings, settings.tissue):
        warnings.warn(
            f"the sheet's column mask is not used ({n_masks} of {len(rows)} rows have one): tissue is found by "
            f"{settings.tissue!r}, see --tissue",
            SlideWarning,
            stacklevel=3,
        )
    elif settings.tissue is None and 0 < n_masks < len(rows) and not _uses_masks(settings, DEFAULT_TISSUE):
        warnings.warn(
            f"tissue of {counted(n_masks, 'slide')} is that of the sheet's column mask, of the other "
            f"{len(rows) - n_masks} it is found by {DEFAULT_TISSUE!r}; --tissue names one method for all",
            SlideWarning,
            stacklevel=3,
        )
    return list(rows)


def tissue_request(settings: TissueSettings, sample: Sample) -> TissueRequest:
    """Return how tissue is found on one slide.

    Raises
    ------
    MaskError
        If it needs a mask, and there is none.
    """
    wants_mask = sample.mask is not None or settings.masks is not None
    method = settings.tissue or (MASK if wants_mask else DEFAULT_TISSUE)
    if not _uses_masks(settings, method):
        return TissueRequest(method)
    if sample.mask is None:
        where = "in the folder of --mask" if settings.masks is not None else "in the sheet's column mask"
        option = f"--tissue {method}" if TISSUE_METHODS.get(method).needs_region else "--within and --without"
        raise MaskError(
            f"{option} needs a mask for slide {sample.slide_id!r}, and there is none {where}; add one, or drop the slide"
        )
    return TissueRequest(method, Region(sample.mask, settings.within, settings.without))


def _uses_masks(settings: TissueSettings, method: str) -> bool:
    return bool(settings.within or settings.without) or TISSUE_METHODS.get(method).needs_region
