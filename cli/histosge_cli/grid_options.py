"""The grid that the options of `histosge embed` describe."""

import re

from featurestore.errors import StoreError
from featurestore.grid import GridSpec, TokenGridSpec

_TOKENS = re.compile(r"(\d{1,4})(\+cls)?")


def grid_spec(
    mpp: float, patch: int, stride: int | None, tokens: str | None, token_overlap: int | None
) -> GridSpec:
    """Return the grid of patches, or of tokens.

    Raises
    ------
    StoreError
        If no grid has these values; the options are named.
    """
    if tokens is None and token_overlap is not None:
        raise StoreError(
            "--token-overlap is the overlap of patches with --tokens; for patches alone give --stride"
        )
    try:
        if tokens is None:
            return GridSpec(mpp, patch, patch if stride is None else stride)
        found = _TOKENS.fullmatch(tokens)
        if not found:
            raise StoreError(
                f"--tokens {tokens[:20]!r} is no number of positions along a patch; give it such as 4, or 4+cls to join "
                "each with the patch's own vector"
            )
        overlap = token_overlap or 0
        # The step between patches follows from the overlap: two values for one thing could contradict each other.
        if stride not in (None, patch - overlap):
            raise StoreError(
                f"--stride {stride} does not go with --tokens, whose patches lie edge to edge; leave it out, or give "
                f"--token-overlap {2 * ((patch - stride) // 2) if patch // 2 <= stride < patch else 0}"
            )
        return TokenGridSpec.from_patches(
            mpp, patch, int(found[1]), overlap_px=overlap, cls_token=found[2] is not None
        )
    except ValueError as error:
        raise StoreError(f"{error}; see --mpp, --patch, --stride, --tokens, --token-overlap") from error
