"""A table of position embeddings for another input than the one that it was trained for."""

from math import isqrt

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from featurestore.encoders.records import Positions


def published_shape(own: tuple[int, ...], positions: Positions) -> tuple[int, ...]:
    """Return the shape of the table in the published file, where ``own`` is that of the network's table."""
    _, rows, width = own
    return (1, rows - isqrt(rows) ** 2 + positions.grid**2, width)


def resample_positions(table: Tensor, rows: int, positions: Positions) -> Tensor:
    """Resample a square table bicubically to another number of rows.

    Done once, when weights are loaded: an encoder's input has one size, so the authors' code would do the same at
    every forward pass.

    Parameters
    ----------
    table
        Shape ``(1, prefix + grid ** 2, width)``; rows of class tokens come first and are kept.
    rows
        Of the result, with the same prefix.
    positions
        Grid of `table`, and whether to resample with antialiasing.
    """
    side = isqrt(rows)
    prefix = rows - side * side
    square = table[:, prefix:].float().reshape(1, positions.grid, positions.grid, -1).permute(0, 3, 1, 2)
    square = interpolate(
        square, (side, side), mode="bicubic", align_corners=False, antialias=positions.antialias
    )
    resampled = square.permute(0, 2, 3, 1).flatten(1, 2).to(table.dtype)
    return torch.cat([table[:, :prefix], resampled], dim=1)
