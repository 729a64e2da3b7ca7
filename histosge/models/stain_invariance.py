"""How far a change of stain moves embeddings: another lab's slide is paler or pinker, and no other tissue.

Training on copies of each patch in many stains would, for a linear model, add w'Cw to its mean squared error, C being
the covariance of the shifts of the embedding when the stain changes. So nothing is trained on twice: C is measured
once, on some patches, and added to the Gram matrix.

A slide's stain is the same all over it. So where one patch shifts, the means around it shift as the patches of the
slide do on average.
"""

from collections.abc import Sequence

import numpy as np

from histosge.data.sections import StainPairs, TrainingSection
from histosge.models.linear_algebra import Floats

STRENGTH = 1.0
"""Factor of the covariance; 1 is what training on patches in other stains would come to."""


def stain_covariance(
    sections: Sequence[TrainingSection], *, own: bool, strength: float = STRENGTH
) -> Floats | None:
    """Return `strength` times the covariance of the embedding's shifts with stain, ``(dim, dim)``.

    None where no section has stain pairs.

    Parameters
    ----------
    own
        Of a patch's own embedding; else of a mean over its neighbourhood, where only what all patches share is left.
    """
    shifts = [_shifts(s.stain_pairs, own=own) for s in sections if s.stain_pairs is not None]
    if not shifts:
        return None
    rows = np.concatenate(shifts)
    # About 0, not about their mean: a shift that all patches share is just what must not be followed.
    return np.asarray(strength * rows.T @ rows / len(rows))


def relative_stain_covariance(
    sections: Sequence[TrainingSection], *, strength: float = STRENGTH
) -> Floats | None:
    """Return `stain_covariance` of a patch's own embedding less what its whole slide shifts by, ``(dim, dim)``."""
    shifts = [
        _shifts(s.stain_pairs, own=True)
        - np.repeat(_shifts(s.stain_pairs, own=False), len(s.stain_pairs.plain), axis=0)
        for s in sections
        if s.stain_pairs is not None
    ]
    if not shifts:
        return None
    rows = np.concatenate(shifts)
    return np.asarray(strength * rows.T @ rows / len(rows))


def _shifts(stain_pairs: StainPairs, *, own: bool) -> Floats:
    """Return the shift of each patch, or of their mean, with each stain, ``(n, dim)``."""
    shifts = stain_pairs.stained.astype(np.float64) - stain_pairs.plain
    # The whole slide is stained alike, so the mean over these patches stands for any part of it.
    return np.concatenate(shifts) if own else shifts.mean(axis=1)
