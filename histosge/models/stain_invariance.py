"""Penalise what a change of stain does to features: another lab's slide is paler or pinker, and no other tissue.

Training on patches in many stains would, for a linear model, add the penalty w'Cw to its squared error, C being the
covariance of the shifts of the features when the stain changes. So nothing is trained on twice: C is measured once,
on some patches, and the ridge's own penalty |w|^2 becomes w'(I + C)w. With inputs transformed by (I + C)^(-1/2) that
is an ordinary ridge.

A slide's stain is the same all over it. So where one patch shifts, the means around it shift as the patches of the
slide do on average, and the standard deviations as the slide's does.
"""

from collections.abc import Sequence

import numpy as np

from histosge.data.sections import StainPairs, TrainingSection
from histosge.models.linear_algebra import Floats, Standardiser, symmetric_eigen
from histosge.models.multiscale import MOMENTS, MultiscaleFeatures

# The middle of what does about the same on the public sections (1 to 30); it was not searched for.
STRENGTH = 10.0
"""Weight of the penalty along stain shifts, relative to the ridge's own."""


def stain_covariance(
    sections: Sequence[TrainingSection], features: MultiscaleFeatures, strength: float = STRENGTH
) -> Floats | None:
    """Return `strength` times the covariance of the features' shifts with stain, ``(n_features, n_features)``.

    None where no section has stain pairs.
    """
    shifts = [_feature_shifts(s.stain_pairs, features) for s in sections if s.stain_pairs is not None]
    if not shifts:
        return None
    rows = np.concatenate(shifts)
    # About 0, not about their mean: a shift that all patches share is just what must not be followed.
    return np.asarray(strength * rows.T @ rows / len(rows))


def _feature_shifts(stain_pairs: StainPairs, features: MultiscaleFeatures) -> Floats:
    """Return the shift of each patch's features with each stain, ``(n_stains * n_patches, n_features)``."""
    reduce = features.reduce
    plain, *stained = (
        values.astype(np.float64) if reduce is None else reduce(values)
        for values in (stain_pairs.plain, *stain_pairs.stained)
    )
    rows = []
    for values in stained:
        own = values - plain
        # Of the neighbourhood: the whole slide is stained alike, so its mean and spread stand for any part of it.
        around = {"mean": own.mean(axis=0), "sd": values.std(axis=0) - plain.std(axis=0)}
        rows.append(
            np.hstack(
                [own if sigma == 0 else np.tile(around[kind], (len(own), 1)) for sigma, kind in MOMENTS]
            )
        )
    return np.concatenate(rows)


def penalty_transform(covariance: Floats | None, standardiser: Standardiser) -> Floats | None:
    """Return (I + C)^(-1/2) for standardised features, ``(n, n)``, symmetric; None where C is None.

    Parameters
    ----------
    covariance
        C, of the features before they are standardised.
    """
    if covariance is None:
        return None
    scaled = covariance / standardiser.scale[:, None] / standardiser.scale
    square, axes = symmetric_eigen(np.eye(len(scaled)) + scaled)
    return np.asarray(axes / np.sqrt(square) @ axes.T)
