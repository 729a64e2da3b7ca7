"""How the values of a block are coded: float16 as they are, or rounded and compressed, for a store of fewer bytes.

Rounding is done before a block is written, so what is stored are float16 values like any others, and every reader of Zarr
gets them: no codec of an extension stands in the metadata.

Terms
    bits  of the fraction of a float16, of which there are 10
"""

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
from numcodecs import BitRound
from numpy.typing import NDArray
from zarr.codecs import BloscCodec, Crc32cCodec

from featurestore.errors import StoreError

FRACTION_BITS = 10
ZSTD_LEVEL = 3
"""Of `morphology` rounded to 7 bits, level 3 leaves 0.246 of the bytes, level 1 leaves 0.269; level 5 leaves 0.243 and
writes at 0.65 of the speed."""
_INFINITE = 0x7C00
_BITROUND = re.compile(r"bitround:(\d{1,3})(\+zstd)?")


@dataclass(frozen=True)
class Coding:
    """One way to code values. Make one with `parse_coding`; the default is float16 as it is.

    Parameters
    ----------
    bits
        Bits of the fraction that are kept; 10 are all of float16.
    compressed
        Whether objects are compressed by zstd.
    """

    bits: int = FRACTION_BITS
    compressed: bool = False

    @property
    def name(self) -> str:
        """As the user names it, and as the array's attribute says it."""
        if self == Coding():
            return "float16"
        return f"bitround:{self.bits}{'+zstd' if self.compressed else ''}"

    @property
    def compressors(self) -> list[Any]:
        """Codecs of an array, after the one that makes bytes. The checksum comes last: over what is stored."""
        if not self.compressed:
            return [Crc32cCodec()]
        # Bits of one position lie beside each other, those that rounding made zero among them: of `morphology` rounded to
        # 7 bits 0.246 of the bytes are left, and 0.302 by zstd alone.
        return [
            BloscCodec(cname="zstd", clevel=ZSTD_LEVEL, shuffle="bitshuffle", typesize=2),
            Crc32cCodec(),
        ]

    def round(self, values: NDArray[Any]) -> NDArray[Any]:
        """Return float16 values rounded to the nearest that has `bits` bits; NaN stays NaN, no number becomes infinite.

        Raises
        ------
        StoreError
            If the values are of another dtype.
        """
        if self.bits == FRACTION_BITS:
            return values
        if values.dtype != np.float16:
            raise StoreError(f"{self.name} is for float16 values, not {values.dtype}")
        # A copy, since the codec may round in place. NaN of one pattern: others could carry into the sign.
        whole = np.where(np.isnan(values), np.float16("nan"), values)
        rounded: NDArray[np.float16] = BitRound(self.bits).encode(whole.copy()).view(np.float16)
        overflow = np.isinf(rounded) & np.isfinite(whole)
        if overflow.any():
            largest = np.uint16(_INFINITE - (1 << (FRACTION_BITS - self.bits))).view(np.float16)
            rounded[overflow] = np.copysign(largest, whole[overflow])
        return rounded.reshape(values.shape)

    def is_rounded(self, values: NDArray[Any]) -> bool:
        """Tell whether float16 values are as `round` leaves them."""
        if self.bits == FRACTION_BITS:
            return True
        unused = np.uint16((1 << (FRACTION_BITS - self.bits)) - 1)
        numbers = values[~np.isnan(values)]
        return bool(values.dtype == np.float16 and not (numbers.view(np.uint16) & unused).any())


def parse_coding(name: str) -> Coding:
    """Return a coding by its name.

    Raises
    ------
    StoreError
        If there is none of that name; the message lists what is possible.
    """
    possible = (
        "give float16, bitround:N or bitround:N+zstd, where N is 1 to 10 bits of the fraction (7 is usual)"
    )
    if name == "float16":
        return Coding()
    match = _BITROUND.fullmatch(name)
    if match is None:
        raise StoreError(f"embeddings are not stored as {name[:60]!r}: {possible}")
    bits = int(match[1])
    if not 1 <= bits <= FRACTION_BITS:
        raise StoreError(
            f"embeddings are not stored as {name[:60]!r}: a float16 has {FRACTION_BITS} bits of fraction; {possible}"
        )
    return Coding(bits, match[2] is not None)
