"""Conversions and tests of float16 arrays by integer arithmetic on their bits.

numpy converts float16 one value at a time; these use vector instructions and give exactly the same results: the
float32 values of `astype`, and the rows of `isnan`. Arithmetic alone, no I/O.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

_INFINITE = 0x7C00
"""Bits of +infinity: what is larger, without its sign, is NaN."""
_SIGN = 0x8000
_SCALE = np.float32(2.0**112)
"""Float32's exponent bias is 127, float16's 15."""


def has_nan(values: NDArray[Any]) -> bool:
    """Tell whether a contiguous array holds NaN anywhere: several times faster than testing row by row."""
    if values.dtype != np.float16 or values.size == 0:
        return bool(np.isnan(values).any())
    flat = values.reshape(-1)
    # NaN has the largest bits among values of its sign. As signed integers negative values are below all others, as
    # unsigned ones above: the maximum of each view finds NaN of one sign.
    return bool(flat.view(np.int16).max() > _INFINITE or flat.view(np.uint16).max() > (_SIGN | _INFINITE))


def nan_rows(values: NDArray[Any]) -> NDArray[np.bool_]:
    """Return which rows of ``(n, dim)`` hold NaN."""
    if values.dtype != np.float16 or values.shape[1] == 0:
        return np.asarray(np.isnan(values).any(axis=1))
    if not has_nan(values):
        return np.zeros(len(values), bool)
    positive = values.view(np.int16).max(axis=1) > _INFINITE
    return np.asarray(positive | (values.view(np.uint16).max(axis=1) > (_SIGN | _INFINITE)))


def rows_without_nan(values: NDArray[Any], wanted: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Return the wanted rows of ``(n, dim)`` that hold no NaN, ascending; the others are not read."""
    rows = np.flatnonzero(wanted)
    # Run by run of neighbouring rows: slices are views, and picking rows by an index would copy them.
    runs = np.split(rows, np.flatnonzero(np.diff(rows) > 1) + 1)
    kept = [run[~nan_rows(values[run[0] : run[-1] + 1])] for run in runs if len(run)]
    return np.concatenate(kept) if kept else rows


def to_float32(values: NDArray[Any], out: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
    """Return finite values as float32.

    Parameters
    ----------
    values
        Any shape, contiguous.
    out
        Memory for the result, of the same shape.

    Raises
    ------
    ValueError
        If a float16 value is not finite: its bits would come out as a large number.
    """
    out = np.empty(values.shape, np.float32) if out is None else out
    if values.dtype != np.float16:
        out[...] = values
        return out
    if values.size and (
        values.view(np.int16).max() >= _INFINITE or values.view(np.uint16).max() >= (_SIGN | _INFINITE)
    ):
        raise ValueError("values that are not finite cannot be converted by their bits")
    # float16 has 5 bits of exponent and 10 of fraction, float32 8 and 23. Shifted by 13 they meet the field of the
    # fraction and the low end of that of the exponent, which makes the value too small by 2**112, subnormal ones too.
    bits = out.view(np.int32)
    bits[...] = values.view(np.int16)  # extends the sign, so that it stays in the topmost bit
    bits <<= 13
    bits &= np.int32(-0x70002000)  # the sign, and the 15 bits of exponent and fraction
    np.multiply(out, _SCALE, out=out)
    return out


def to_float16(vectors: NDArray[np.float32]) -> tuple[NDArray[np.float16], NDArray[np.intp]]:
    """Round vectors to the stored dtype.

    Returns
    -------
    (numpy.ndarray, numpy.ndarray)
        The vectors ``(n, dim)``, and the indices of those that hold a number that is not finite in float16: all their
        features are NaN.
    """
    with np.errstate(over="ignore"):  # beyond 65,504 a number becomes infinite, and its vector NaN below
        stored = vectors.astype(np.float16)
    unusable = ~np.isfinite(stored).all(axis=-1)
    stored[unusable] = np.nan
    return stored, np.flatnonzero(unusable)
