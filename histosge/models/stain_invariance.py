"""Keeps what a model learned from following the stain: another lab's slide is paler or pinker, and no other tissue.

Training on patches in many stains would, for a linear model, add the penalty w'Cw to its squared error, C being the
covariance of how far a change of stain moves the features. So nothing is trained on twice: C is measured once, on
some patches, and the ridge's own penalty |w|^2 becomes w'(I + C)w. With inputs turned by (I + C)^(-1/2) that is
ridge as before.

A slide's stain is the same all over it. So where one patch moves, the means around it move as the patches of the
slide do on average, and the spreads as their spread does.
"""

from collections.abc import Sequence

import numpy as np

from histosge.data.sections import StainPairs, TrainingSection
from histosge.models.linear_algebra import Floats, Standardiser
from histosge.models.multiscale import VIEWS, Surroundings

STRENGTH = 10.0
"""Of the penalty along what the stain moves, relative to the ridge's own; 1 to 30 do about the same."""


def stain_covariance(
    sections: Sequence[TrainingSection], surroundings: Surroundings, strength: float = STRENGTH
) -> Floats | None:
    """Return `strength` times the covariance of what stains do to views, ``(n_features, n_features)``.

    None where no section was stain_pairs.
    """
    moves = [_moves(s.stain_pairs, surroundings) for s in sections if s.stain_pairs is not None]
    if not moves:
        return None
    rows = np.concatenate(moves)
    return np.asarray(strength * rows.T @ rows / len(rows))


def _moves(stain_pairs: StainPairs, surroundings: Surroundings) -> Floats:
    """Return how the views of each patch move with each stain, ``(n_stains * n_patches, n_features)``."""
    reduce = surroundings.reduce
    plain, *stained = (
        values.astype(np.float64) if reduce is None else reduce(values)
        for values in (stain_pairs.plain, *stain_pairs.stained)
    )
    rows = []
    for values in stained:
        own = values - plain
        around = {"mean": own.mean(axis=0), "sd": values.std(axis=0) - plain.std(axis=0)}
        rows.append(
            np.hstack(
                [own if sigma == 0 else np.tile(around[moment], (len(own), 1)) for sigma, moment in VIEWS]
            )
        )
    return np.concatenate(rows)


def steady(moved: Floats | None, standardiser: Standardiser) -> Floats | None:
    """Return (I + C)^(-1/2) for standardised features, symmetric; None where nothing is to be penalised."""
    if moved is None:
        return None
    scaled = moved / standardiser.scale[:, None] / standardiser.scale
    square, axes = np.linalg.eigh(np.eye(len(scaled)) + scaled)
    return np.asarray(axes / np.sqrt(square) @ axes.T)
