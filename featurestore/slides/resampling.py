"""Averages of pixels under larger ones: whole squares in integers, or fractional areas by sparse weights."""

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from scipy import sparse


def bin_pixels(pixels: NDArray[np.uint8], factor: int) -> NDArray[np.uint8]:
    """Average whole squares of pixels, halves rounded up.

    Parameters
    ----------
    pixels
        RGB, sides multiples of `factor`.
    factor
        One of `featurestore.slides.pyramid_slide.BINARY_FACTORS`; larger sums would not fit in 16 bits.
    """
    height, width = pixels.shape[0] // factor, pixels.shape[1] // factor
    # Sums down run along whole rows; then, channel by channel, those across.
    down = np.add(pixels[0::factor], pixels[1::factor], dtype=np.uint16)
    for row in range(2, factor):
        down += pixels[row::factor]
    squares = down.reshape(height, width, 3 * factor)
    sums = np.empty((height, width, 3), np.uint16)
    for channel in range(3):
        total = np.add(squares[..., channel], squares[..., channel + 3], out=sums[..., channel])
        for column in range(2, factor):
            total += squares[..., channel + 3 * column]
    # Half of the divisor first: the shift then rounds halves up, as the weighted mean does.
    sums += np.uint16(factor * factor // 2)
    sums >>= np.uint16(2 * factor.bit_length() - 2)
    return sums.astype(np.uint8)


def area_weights(start: int, count: int, scale: float) -> "tuple[sparse.csr_matrix, int]":
    """Weights that average source pixels under each output pixel, fractional edges included.

    Parameters
    ----------
    start, count
        First output pixel and how many.
    scale
        Source pixels per output pixel, at least 1.

    Returns
    -------
    (scipy.sparse.csr_matrix, int)
        Shape ``(count, n_source)``, rows sum to 1; and the first source pixel.
    """
    # Here, since most slides are read at a level's own scale, and scipy.sparse takes 0.2 s.
    from scipy import sparse

    edges = (start + np.arange(count + 1)) * scale
    first = np.floor(edges[:-1]).astype(np.int64)
    # Without the 1e-9 an edge at 7.0000000001 would take in a whole further source pixel, at a weight of nearly 0.
    last = np.maximum(np.ceil(edges[1:] - 1e-9).astype(np.int64), first + 1)
    origin, stop = int(first[0]), int(last[-1])
    reach = int((last - first).max())
    columns = first[:, None] + np.arange(reach)
    overlap = np.minimum(columns + 1, edges[1:, None]) - np.maximum(columns, edges[:-1, None])
    overlap = np.clip(overlap, 0, None) * (columns < last[:, None])
    weights = (overlap / overlap.sum(axis=1, keepdims=True)).astype(np.float32)
    rows = np.repeat(np.arange(count), reach)
    keep = weights.ravel() > 0
    matrix = sparse.csr_matrix(
        (weights.ravel()[keep], (rows[keep], (columns - origin).ravel()[keep])), shape=(count, stop - origin)
    )
    return matrix, origin
