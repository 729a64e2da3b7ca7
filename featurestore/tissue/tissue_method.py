"""What a way of finding tissue declares, and the registry of all of them.

A method is one module with a ``RECORD``: in our folder ``methods``, or in any installed package that names its record
under the entry-point group ``histosge.tissue_methods``.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featurestore.errors import TissueError
from featurestore.extensions import Registry
from featurestore.tissue.overview import Overview

DEFAULT_TISSUE = "texture"
RESERVED = ("name", "version", "overview_mpp", "region")
"""What every grid's tissue attributes hold beside the method's parameters."""


@dataclass(frozen=True)
class TissueMethod:
    """One way of telling tissue from glass.

    Parameters
    ----------
    name
        What a user types after ``--tissue``, and what a grid's attributes record.
    help
        One line for help and documentation.
    mask
        Returns which pixels of an overview are tissue, bool, ``(height, width)``; raises `SlideError` for a slide that
        it cannot judge. None: every patch counts as tissue, whatever it shows.
    version
        Raised when the same parameters give other masks than before.
    parameters
        What decides the mask, JSON-ready; a grid's attributes record it beside `name` and `version`.
    needs_region
        Whether a mask or annotation file has to be given for each slide.
    """

    name: str
    help: str
    mask: Callable[[Overview], NDArray[np.bool_]] | None
    version: int = 1
    parameters: Mapping[str, Any] = field(default_factory=dict)
    needs_region: bool = False

    def __post_init__(self) -> None:
        if taken := sorted(set(RESERVED) & set(self.parameters)):
            raise ValueError(
                f"tissue method {self.name!r} has parameters named {', '.join(taken)}; rename them"
            )

    def to_attrs(self, overview_mpp: float, region: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Return what a grid's attributes record, JSON-ready.

        Parameters
        ----------
        region
            What is recorded of the file that restricts tissue; None if there is none.
        """
        # Names and order as in the stores that exist.
        facts: dict[str, Any] = {"name": self.name, "version": self.version}
        if self.mask is not None or region is not None:
            facts["overview_mpp"] = overview_mpp
        facts |= self.parameters
        return facts if region is None else {**facts, "region": dict(region)}


TISSUE_METHODS: Registry[TissueMethod] = Registry(
    "tissue_methods", "featurestore.tissue.methods", TissueMethod, TissueError
)
