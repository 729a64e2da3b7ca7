"""How far a slide's embeddings lie from those that a model was trained on: evidence on tissue that nobody measured.

Calibrated on one donor, intervals covered two thirds of the spots of another donor, not nine in ten. Whether a new slide is
like the training sections cannot be known without its expression, but its embeddings can be compared with theirs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from histosge.data.sections import TrainingSection

Values = NDArray[np.float32]

MAX_PATCHES = 4096
"""Of a section, evenly spread, at most: a mean of 4,096 has an error of 0.02 standard deviations."""


@dataclass(frozen=True)
class EmbeddingReference:
    """Where the embeddings of the training sections lie.

    Parameters
    ----------
    mean, sd
        Mean over sections, and standard deviation within them, of each number of the embedding, ``(dim,)``.
    among_sections
        Largest distance of a training section from the mean of the others; None for a lone section.
    """

    mean: Values
    sd: Values
    among_sections: float | None

    @classmethod
    def fit(cls, sections: Sequence[TrainingSection]) -> Self:
        """Summarise the patches of some sections."""
        return cls.from_moments([embedding_moments(section.patches.embedding) for section in sections])

    @classmethod
    def from_moments(cls, moments: Sequence[tuple[NDArray[np.float64], NDArray[np.float64]]]) -> Self:
        """Summarise the mean and the variance of each section's embeddings, ``(dim,)`` each, see `MAX_PATCHES`."""
        means, variances = (np.stack(part) for part in zip(*moments, strict=True))
        sd = np.sqrt(variances.mean(axis=0))
        largest = None
        if len(means) > 1:
            others = (means.sum(axis=0) - means) / (len(means) - 1)
            largest = max(_rms(own - rest, sd) for own, rest in zip(means, others, strict=True))
        return cls(means.mean(axis=0).astype(np.float32), sd.astype(np.float32), largest)

    def distance(self, embedding: NDArray[np.floating]) -> float:
        """Return how far the mean of ``(n_patches, dim)`` embeddings lies from that of training.

        It is the root mean square over the numbers of an embedding, in standard deviations within training sections.
        """
        return _rms(embedding_moments(embedding)[0] - self.mean, self.sd.astype(np.float64))


def embedding_moments(embedding: NDArray[np.floating]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the mean and the variance of ``(n_patches, dim)`` embeddings, ``(dim,)`` each, of `MAX_PATCHES` at most."""
    some = embedding[:: every_patch(len(embedding))].astype(np.float64)
    return some.mean(axis=0), some.var(axis=0)


def every_patch(n_patches: int) -> int:
    """Return the step from one patch to the next that `embedding_moments` takes."""
    return max(1, -(-n_patches // MAX_PATCHES))


def _rms(difference: NDArray[np.float64], sd: NDArray[np.float64]) -> float:
    # A number that does not vary in training would make any difference infinite; it is left out.
    varies = sd > 1e-6 * max(float(sd.max(initial=0.0)), 1e-12)
    if not varies.any():
        return 0.0
    return float(np.sqrt(np.mean((difference[varies] / sd[varies]) ** 2)))
