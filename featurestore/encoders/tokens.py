"""From an encoder's map of tokens to the K x K vectors of a patch: which tokens form a group, and what an encoder gives.

It knows no network: `featurestore.encoders.token_network` does the same inside one, on its device.

Terms
    map    the tokens of one patch, ``(side, side, dim)``; a transformer's patch tokens, or the last feature map of a
           convolutional network
    group  the tokens whose mean is one position of a token grid
    rim    tokens that are cut off at each edge of the map, where patches overlap
"""

from dataclasses import dataclass
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from featurestore.encoders.protocol import Encoder, EncoderIdentity
from featurestore.errors import EncoderError
from featurestore.grid import TokenGridSpec


@dataclass(frozen=True)
class TokenMap:
    """The map of tokens that an encoder has of each patch.

    Parameters
    ----------
    side
        Tokens along a side.
    visible
        Share of the patch's side that the map covers: less than 1 where preprocessing crops the patch.
    """

    side: int
    visible: float = 1.0


class TokenEncoder(Encoder, Protocol):
    """An encoder that also gives its map of tokens; `--tokens` works with every encoder that has these two members."""

    @property
    def token_map(self) -> TokenMap:
        """Return the map's size."""
        ...

    def encode_tokens(self, patches: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Encode a batch once.

        Parameters
        ----------
        patches
            As for `encode`.

        Returns
        -------
        (numpy.ndarray, numpy.ndarray)
            What `encode` returns, ``(n, dim)``, and the maps, ``(n, side, side, token dim)``, rows downwards.
        """
        ...


@dataclass(frozen=True)
class Groups:
    """How the tokens of one map form the positions of a token grid.

    Parameters
    ----------
    side
        Tokens along a side of the map.
    rim
        Tokens cut off at each edge.
    k
        Groups along a side of what is left.
    cls_token
        Whether each group's vector is followed by the patch's own.
    """

    side: int
    rim: int
    k: int
    cls_token: bool

    @classmethod
    def fit(cls, spec: TokenGridSpec, token_map: TokenMap, key: str) -> Self:
        """Return the groups of an encoder's map on a token grid.

        Parameters
        ----------
        key
            The encoder's, for messages.

        Raises
        ------
        EncoderError
            If groups would not be of whole tokens; the values that fit are given.
        """
        side, patch_px = token_map.side, spec.encoded.patch_px
        about = f"{key} has a map of {side} x {side} tokens of a patch of {patch_px} px"
        if token_map.visible < 1:
            about += f", of which it sees the inner {patch_px * token_map.visible:g}"
        rims = _overlaps(patch_px, token_map)
        if not rims:
            # The nearest that fits: a whole number of pixels a token, so that every K that divides the map does.
            near = max(1, round(patch_px / side)) * side
            raise EncoderError(
                f"{about}, and no number of tokens is a whole number of pixels; give --patch {near}"
            )
        if spec.token_overlap_px not in rims:
            raise EncoderError(
                f"{about}, and --token-overlap {spec.token_overlap_px} does not cut off whole tokens; give "
                f"--token-overlap {_either(sorted(rims))}"
            )
        rim = rims[spec.token_overlap_px]
        kept, kept_px = side - 2 * rim, patch_px - spec.token_overlap_px
        fitting = [k for k in range(1, kept + 1) if kept % k == 0 and kept_px % k == 0]
        if spec.tokens not in fitting:
            left = f", {kept} x {kept} without its rim" if rim else ""
            more = ""
            if len(fitting) < sum(kept % k == 0 for k in range(1, kept + 1)):
                more = f", or --patch {_near(patch_px, token_map)} for any K that divides {kept}"
            raise EncoderError(
                f"{about}{left}, which --tokens {spec.tokens} does not divide; give --tokens {_either(fitting)}{more}"
            )
        return cls(side, rim, spec.tokens, spec.token_cls)

    def facts(self) -> dict[str, Any]:
        """Return JSON-ready values: part of an encoder's identity, so none of these names may change."""
        return {"map": self.side, "rim": self.rim, "groups": self.k, "cls": self.cls_token}

    def identity(self, encoder: EncoderIdentity, token_dim: int) -> EncoderIdentity:
        """Return the identity of an encoder's vectors of groups, from that of its vectors of patches."""
        dim = token_dim + (encoder.dim if self.cls_token else 0)
        return EncoderIdentity(encoder.key, dim, {**encoder.facts, "tokens": self.facts()})


def _overlaps(patch_px: int, token_map: TokenMap) -> dict[int, int]:
    """Return the overlaps of patches, in pixels, that cut off whole tokens, and how many at each edge."""
    found = {}
    for rim in range((token_map.side + 1) // 2):
        kept_px = patch_px * token_map.visible * (token_map.side - 2 * rim) / token_map.side
        overlap = round(patch_px - kept_px)
        # Even, since both rims are equal; at most half, see `TokenGridSpec.from_patches`.
        if abs(patch_px - overlap - kept_px) < 1e-6 and overlap % 2 == 0 and overlap <= patch_px / 2:
            found[overlap] = rim
    return found


def _near(patch_px: int, token_map: TokenMap) -> int:
    """Return the side of a patch, near to `patch_px`, whose tokens are whole pixels: every K that divides the map fits."""
    fitting = []
    for token_px in range(1, 2 * max(1, patch_px // token_map.side) + 2):
        side_px = token_px * token_map.side / token_map.visible
        if abs(side_px - round(side_px)) < 1e-6 and round(side_px - token_px * token_map.side) % 2 == 0:
            fitting.append(round(side_px))
    return min(fitting, key=lambda side_px: abs(side_px - patch_px), default=patch_px)


def _either(values: list[int]) -> str:
    *first, last = map(str, values)
    return f"{', '.join(first)} or {last}" if first else last


def group_tokens(encoder: Encoder, spec: TokenGridSpec) -> Encoder:
    """Return an encoder that gives the vectors of a token grid, ``(n, K, K, dim)``.

    Parameters
    ----------
    encoder
        A `TokenEncoder`, or one that was loaded for the grid already.

    Raises
    ------
    EncoderError
        If it has no map of tokens, or its map does not fit the grid.
    """
    if "tokens" in encoder.identity.facts:
        return encoder
    token_map = getattr(encoder, "token_map", None)
    if token_map is None or not hasattr(encoder, "encode_tokens"):
        raise EncoderError(no_map(encoder.identity.key))
    return GroupedEncoder(encoder, Groups.fit(spec, token_map, encoder.identity.key))  # type: ignore[arg-type]


def no_map(key: str) -> str:
    """Return why an encoder cannot fill a token grid, and which can."""
    return (
        f"{key} has no map of tokens, so --tokens does not work with it; leave it out, or use an encoder with a network, "
        "such as uni2-h or timm:<name>"
    )


class GroupedEncoder:
    """A `TokenEncoder` behind the `Encoder` protocol: one vector for each group of tokens."""

    def __init__(self, encoder: TokenEncoder, groups: Groups) -> None:
        self._encoder, self._groups = encoder, groups
        # Only a patch tells the width of a token; its side does not matter.
        none = np.zeros((1, MADE_PATCH_PX, MADE_PATCH_PX, 3), np.uint8)
        token_dim = encoder.encode_tokens(none)[1].shape[-1]
        self._identity = groups.identity(encoder.identity, token_dim)

    @property
    def identity(self) -> EncoderIdentity:
        """The encoder's, with the grouping among its facts."""
        return self._identity

    def encode(self, patches: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Encode a batch, ``(n, side, side, 3)`` -> ``(n, K, K, dim)``.

        Raises
        ------
        EncoderError
            If the encoder's maps are not of the size that it states.
        """
        groups = self._groups
        if not len(patches):
            return np.empty((0, groups.k, groups.k, self._identity.dim), np.float32)
        vectors, tokens = self._encoder.encode_tokens(patches)
        if tokens.shape[:3] != (len(patches), groups.side, groups.side):
            raise EncoderError(
                f"{self._identity.key} gave maps of shape {tokens.shape} of {len(patches)} patches; its token_map says "
                f"{groups.side} x {groups.side}"
            )
        means = group_means(tokens, groups)
        if not groups.cls_token:
            return means
        own = np.broadcast_to(vectors[:, None, None], (*means.shape[:3], vectors.shape[1]))
        return np.concatenate([means, own], axis=-1, dtype=np.float32)


MADE_PATCH_PX = 224
"""Side of the blank patch that tells the width of an encoder's tokens: one that every encoder takes."""


def group_means(tokens: NDArray[np.float32], groups: Groups) -> NDArray[np.float32]:
    """Return the mean of each group, ``(n, side, side, dim)`` -> ``(n, K, K, dim)``."""
    inner = slice(groups.rim, groups.side - groups.rim)
    kept = tokens[:, inner, inner]
    n, k, size = len(kept), groups.k, kept.shape[1] // groups.k
    means: NDArray[np.float32] = kept.reshape(n, k, size, k, size, -1).mean(axis=(2, 4), dtype=np.float32)
    return means
