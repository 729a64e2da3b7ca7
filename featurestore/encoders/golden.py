"""A golden vector: what an encoder makes of one fixed image, so short that two sites can compare it by eye.

The digest is the signs of fixed projections. The last bits of a vector differ between machines, and with them at
most a digit or two of the digest; another encoder, another pooling or other colours change most of it.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from featurestore.encoders.protocol import Encoder

SIDE = 224
"""Of the image: what most networks take without resampling."""
BITS = 64
"""Of the digest: 16 hex digits, few enough to compare by eye. Two unrelated encoders agree on half of the bits."""


@dataclass(frozen=True)
class Golden:
    """What two sites compare.

    Parameters
    ----------
    digest
        16 hex digits.
    first
        The first numbers of the vector.
    norm
        Its length.
    """

    digest: str
    first: tuple[float, ...]
    norm: float


def golden_image(side: int = SIDE) -> NDArray[np.uint8]:
    """Return an image in the colours of H&E, shape ``(side, side, 3)``; integer arithmetic alone, the same anywhere."""
    y, x = np.mgrid[:side, :side].astype(np.int64)
    # Waves of several lengths without a sine: products modulo primes, folded to triangles.
    waves = [np.abs((y * a + x * b + x * y // c) % m - m // 2) for a, b, c, m in _WAVES]
    pink = np.array((236, 184, 212), np.int64)
    purple = np.array((92, 60, 140), np.int64)
    nuclei = ((waves[0] + waves[1]) * 256 // (_WAVES[0][3] + _WAVES[1][3]) * 3).clip(0, 256)
    stain = (pink * nuclei[..., None] + purple * (256 - nuclei[..., None])) // 256
    grain = (waves[2] - _WAVES[2][3] // 4)[..., None]
    pixels: NDArray[np.uint8] = (stain + grain).clip(0, 255).astype(np.uint8)
    return pixels


_WAVES = ((7, 3, 5, 61), (2, 11, 7, 89), (13, 17, 3, 23))
"""(step down, step right, divisor of the product, period) of each wave."""


def golden(encoder: Encoder) -> Golden:
    """Embed the golden image."""
    (vector,) = encoder.encode(golden_image()[None])
    unit = vector.astype(np.float64)
    norm = float(np.linalg.norm(unit))
    signs = _projections(len(unit)) @ unit > 0
    digest = "".join(f"{byte:02x}" for byte in np.packbits(signs))
    return Golden(digest, tuple(float(value) for value in vector[:6]), norm)


def _projections(dim: int) -> NDArray[np.float64]:
    """Return +1 and -1, shape ``(BITS, dim)``, from a fixed congruential generator: no library's random numbers."""
    state, signs = 12345, np.empty(BITS * dim)
    for i in range(signs.size):
        # The constants of ANSI C's example of `rand`; bit 20, as low bits of such a generator have short periods.
        state = (1103515245 * state + 12345) % 2147483648
        signs[i] = 1.0 if state & (1 << 20) else -1.0
    return signs.reshape(BITS, dim)
