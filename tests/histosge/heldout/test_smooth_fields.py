"""Smooth fields have the correlation that they are said to have, and opposite edges are independent."""

import numpy as np
import pytest
from scipy.spatial.distance import pdist, squareform

from histosge.heldout.smooth_fields import LENGTHS, smooth_fields_on_grid, spot_pitch_um


@pytest.mark.parametrize("length", [1.0, *LENGTHS[1:]])
def test_the_correlation_at_a_distance_is_that_of_the_squared_exponential(length: float) -> None:
    rows, cols = (at.ravel() for at in np.mgrid[3:16, 5:24])
    fields = smooth_fields_on_grid(rows, cols, length, 4000, np.random.default_rng(101))
    found = fields @ fields.T / fields.shape[1]
    distance = squareform(pdist(np.stack([rows, cols], axis=1)))
    wanted = np.exp(-(distance**2) / (2 * length**2))
    # The standard error of a correlation of 4,000 fields is 0.016.
    assert np.abs(found - wanted).max() < 0.09
    assert np.abs((found - wanted).mean()) < 0.01


def test_fields_are_drawn_in_the_order_of_the_positions() -> None:
    rows, cols = (at.ravel() for at in np.mgrid[:7, :11])
    order = np.random.default_rng(1).permutation(len(rows))
    fields, again = (
        smooth_fields_on_grid(rows[some], cols[some], 2.0, 3, np.random.default_rng(7))
        for some in (np.arange(len(rows)), order)
    )
    np.testing.assert_array_equal(fields[order], again)


def test_the_pitch_is_the_distance_to_the_nearest_spot() -> None:
    rows, cols = (at.ravel() for at in np.mgrid[:5, :7])
    assert spot_pitch_um(np.stack([cols * 103.0, rows * 131.0], axis=1)) == 103.0
