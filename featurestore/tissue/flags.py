"""The bits of `quality`: what is wrong with a patch, and whether it was left out. Only ``--skip`` leaves patches out."""

from collections.abc import Iterable, Mapping
from enum import IntFlag
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featurestore.errors import TissueError


class Flag(IntFlag):
    """Bits of a patch. `docs/SPEC.md` lists them; a value never changes its meaning. 64 is free for one more."""

    PEN = 1
    BLUR = 2
    FOLD = 4
    BUBBLE = 8
    EDGE = 16
    SKIPPED = 32
    """Whether the patch is tissue that the user left out: its `tissue` is 0."""
    FOCUS_KNOWN = 128
    """Whether the focus of the patch was measured: without it `BLUR` says nothing."""


NAMES = {"pen": Flag.PEN, "blur": Flag.BLUR, "fold": Flag.FOLD, "bubble": Flag.BUBBLE, "edge": Flag.EDGE}
"""The flags that ``--skip`` takes."""


def flag_attrs() -> dict[str, Any]:
    """Return the attributes that name the bits, as the CF conventions for data sets (section 3.5, flags) do."""
    return {
        "flag_masks": [int(flag) for flag in Flag],
        "flag_meanings": " ".join(str(flag.name).lower() for flag in Flag),
    }


def parse_skip(names: Iterable[str]) -> tuple[str, ...]:
    """Return names of flags without repeats, in the order of `NAMES`.

    Raises
    ------
    TissueError
        If one is no flag.
    """
    wanted = [name.strip().lower() for name in names if name.strip()]
    for name in wanted:
        if name not in NAMES:
            raise TissueError(f"--skip {name[:40]!r} is no quality flag; there are {', '.join(NAMES)}")
    return tuple(name for name in NAMES if name in wanted)


def bits_of(names: Iterable[str]) -> int:
    """Return the bits of some flags together."""
    bits = 0
    for name in names:
        bits |= int(NAMES[name])
    return bits


def has_any(quality: NDArray[np.uint8], bits: int) -> NDArray[np.bool_]:
    """Return which patches have at least one of some bits."""
    # As a byte: numpy takes a member of an IntFlag for an int64, and the result would be eight times as large.
    return np.asarray((quality & np.uint8(bits)) > 0)


def count_skipped(quality: NDArray[np.uint8]) -> int:
    """Return how many patches were left out."""
    return int(has_any(quality, Flag.SKIPPED).sum())


def flag_shares(quality: NDArray[np.uint8], is_tissue: NDArray[np.bool_]) -> dict[str, float]:
    """Return the share of the tissue patches with each flag, those above 0, and of the skipped ones under ``skipped``.

    Skipped patches count as tissue here. The share of ``blur`` is that of the patches whose focus was measured.

    Parameters
    ----------
    quality, is_tissue
        Of the same positions, of any shape.
    """
    tissue = quality[is_tissue | has_any(quality, Flag.SKIPPED)]
    if not len(tissue):
        return {}
    shares = {name: _share(tissue, bit) for name, bit in NAMES.items()}
    shares["blur"] = _share(tissue[has_any(tissue, Flag.FOCUS_KNOWN)], Flag.BLUR)
    shares["skipped"] = _share(tissue, Flag.SKIPPED)
    # Not rounded to 0: a flag that one patch of a million carries can be searched for.
    return {name: max(round(share, 4), 1e-4) for name, share in shares.items() if share > 0}


def _share(quality: NDArray[np.uint8], bit: Flag) -> float:
    return float(has_any(quality, bit).mean()) if len(quality) else 0.0


def shares_text(shares: Mapping[str, float]) -> str:
    """Return shares of flags for one line, the largest first; empty if there are none."""
    ordered = sorted(shares.items(), key=lambda item: -item[1])
    return ", ".join(f"{name} {share:.0%}" if share >= 0.01 else f"{name} <1%" for name, share in ordered)
