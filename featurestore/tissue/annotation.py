"""What a mask or annotation file is, whatever its format: classes, and which pixels of an overview each covers.

Terms
    class    what an area is annotated as: a name of QuPath's, or the value of a picture's pixel; "" where there is none
    frame    an overview's pixels, and how they lie on the slide
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from featurestore.errors import MaskError

IGNORED_SUFFIX = "*"
"""QuPath's own rule: classes whose names end in a star (``Region*``, ``Ignore*``) are no result of an annotation."""
ALWAYS_LEFT_OUT = "Ignore*"
"""QuPath's default class for what is not to be looked at: it is cut out of the others."""
_LISTED = 8
_LONGEST = 60
"""Letters of a class in a message."""


@dataclass(frozen=True)
class Frame:
    """Pixels of an overview, and the slide below them.

    Parameters
    ----------
    slide_px, slide_mpp
        ``(width, height)`` and microns per pixel of the slide at level 0.
    shape
        ``(height, width)`` of the overview; its pixel (0, 0) lies at pixel (0, 0) of the slide.
    mpp
        Microns per pixel of the overview.
    """

    slide_px: tuple[int, int]
    slide_mpp: float
    shape: tuple[int, int]
    mpp: float

    @property
    def scale(self) -> float:
        """Level-0 pixels per pixel of the overview."""
        return self.mpp / self.slide_mpp


class Annotation(Protocol):
    """A mask or annotation file, read."""

    @property
    def kind(self) -> Literal["geojson", "picture"]:
        """Return what it is: outlines in level-0 pixels, or a picture of the whole slide."""
        ...

    @property
    def classes(self) -> tuple[str, ...]:
        """Return the classes that it holds, sorted; "" stands for areas without one."""
        ...

    @property
    def remark(self) -> str:
        """Return what the user should know of the file; empty if there is nothing."""
        ...

    def draw(self, classes: Collection[str], frame: Frame) -> NDArray[np.bool_]:
        """Return which pixels of a frame lie in an area of these classes, ``(height, width)``.

        Raises
        ------
        MaskError
            If the file does not fit the slide.
        """
        ...


@dataclass(frozen=True)
class Selection:
    """Which classes of a file count.

    Parameters
    ----------
    taken, left_out
        Areas of the first ones count, except where they are areas of the second ones.
    remark
        What the user should know; empty if there is nothing.
    """

    taken: tuple[str, ...]
    left_out: tuple[str, ...]
    remark: str = ""


def select_classes(
    classes: Sequence[str], within: Sequence[str], without: Sequence[str], label: str
) -> Selection:
    """Choose classes of a file.

    Parameters
    ----------
    classes
        All that the file holds.
    within, without
        Classes that are named to be taken and to be left out. None named to be taken: all but those left out and those
        that QuPath ignores.

    Raises
    ------
    MaskError
        If a class to take is not there (those that are follow), or none is left.
    """
    named = [name for name in classes if name]
    for name in within:
        if name in named:
            continue
        if not named:
            raise MaskError(
                f"{label} has no classes, so --within {name} cannot choose; leave --within out, or classify its areas "
                "(in QuPath: Annotations > Set class)"
            )
        near = get_close_matches(name.lower(), [c.lower() for c in named], n=1, cutoff=0.6)
        hint = next((f"; did you mean {_line(c)!r}?" for c in named if near and c.lower() == near[0]), "")
        raise MaskError(f"{label} has no class {name!r}; there is {_list(named)}{hint}")
    left_out = tuple(name for name in named if name in without or name == ALWAYS_LEFT_OUT)
    left_out = tuple(name for name in left_out if name not in within)
    taken = tuple(within) or tuple(
        name for name in classes if name not in left_out and not name.endswith(IGNORED_SUFFIX)
    )
    if not taken:
        raise MaskError(
            f"{label} has no area left: its classes are {_list(named) or 'none'}, and classes that end in * are left "
            "out unless --within names them"
        )
    # No refusal: most slides of a cohort have no necrosis. But a name that is mistyped would take out nothing at all.
    absent = [name for name in without if name not in named]
    remark = f"{label} has no class {', '.join(map(repr, absent))} to leave out" if absent else ""
    return Selection(taken, left_out, remark)


def _list(names: Sequence[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(map(_line, names[:_LISTED])) + more


def _line(name: str) -> str:
    """Return a class as a part of one line: its name comes from somebody's file."""
    plain = "".join(letter for letter in " ".join(name.split()) if letter.isprintable())
    return plain if len(plain) <= _LONGEST else f"{plain[:_LONGEST]}..."


def draw_selection(
    annotation: Annotation, selection: Selection, frame: Frame, label: str
) -> NDArray[np.bool_]:
    """Return which pixels of a frame are taken.

    Raises
    ------
    MaskError
        If there are none, or the file does not fit the slide.
    """
    region = annotation.draw(selection.taken, frame)
    if selection.left_out:
        region &= ~annotation.draw(selection.left_out, frame)
    if not region.any():
        width, height = frame.slide_px
        raise MaskError(
            f"{label} leaves nothing of the slide of {width} x {height} px (classes taken: "
            f"{_list([name or 'areas without a class' for name in selection.taken])}); correct it, or leave the slide out"
        )
    return region
