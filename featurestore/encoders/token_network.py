"""The map of tokens inside a timm network, and its groups: averaged on the device, so that only K x K vectors leave it.

What stands for a group is what the network itself would make of it: tokens of a transformer are averaged after its last
norm, and go through the projection where an encoder's vector does; a part of a feature map goes through the network's own
pooling and what follows it, as if it were a whole map.
"""

from typing import Any

import torch
from torch import Tensor

from featurestore.encoders.architecture import POOLED_TOKENS, build, pool_tokens
from featurestore.encoders.records import EncoderRecord
from featurestore.encoders.tokens import Groups, TokenMap, no_map
from featurestore.errors import EncoderError
from featurestore.grid import TokenGridSpec


def fit_groups(record: EncoderRecord, spec: TokenGridSpec) -> Groups:
    """Return how the map of a record's network is grouped on a token grid; no weights are needed.

    Raises
    ------
    EncoderError
        If the network has no map, or it does not fit the grid.
    """
    if record.package != "timm":
        raise EncoderError(
            f"{record.key}: its authors' package gives no map of tokens, so --tokens does not work with it; leave it out"
        )
    input_px = record.preprocessing.input_px
    # On the meta device: before gigabytes are downloaded, and without the seconds that a forward pass takes.
    with torch.device("meta"):
        model = build(record)
        features = model.forward_features(torch.empty(1, 3, input_px, input_px))
    maps = _as_map(features, model, record)
    if maps is None:
        raise EncoderError(no_map(record.key))
    return Groups.fit(spec, TokenMap(maps.shape[1], input_px / record.preprocessing.resize_px), record.key)


def token_dim(record: EncoderRecord) -> int:
    """Return the width of one group's vector: that of the patch's own, of which a mean of tokens is no second half."""
    return record.dim // 2 if record.pooling == "cls+mean" else record.dim


def encode_groups(model: Any, images: Tensor, record: EncoderRecord, groups: Groups) -> Tensor:
    """Run the network once and make the vectors of a patch's groups, float32.

    Parameters
    ----------
    images
        ``(n, 3, side, side)``, normalised.

    Returns
    -------
    torch.Tensor
        ``(n, K, K, dim)``: of each group, followed by the patch's own where `groups.cls_token`.
    """
    features = model.forward_features(images)
    maps = _as_map(features, model, record)
    assert maps is not None  # `fit_groups` has seen it
    inner = slice(groups.rim, groups.side - groups.rim)
    parts = _cut(maps[:, inner, inner], groups.k)
    # In float32: a mean of many tokens in half precision loses digits.
    vectors = _head(model, parts.float(), record, is_sequence=features.ndim == 3)
    # -1, here and below: OpenVINO traces the network with two patches, and a length would be fixed at that.
    vectors = vectors.reshape(-1, groups.k, groups.k, vectors.shape[1])
    if not groups.cls_token:
        return vectors
    own = _own_vector(model, features, record)
    return torch.cat([vectors, own[:, None, None].expand(-1, groups.k, groups.k, -1)], dim=-1)


def _as_map(features: Any, model: Any, record: EncoderRecord) -> Tensor | None:
    """Return a network's features as maps, ``(n, side, side, dim)``; None if they are none."""
    if not isinstance(features, Tensor) or features.ndim not in (3, 4):
        return None
    if features.ndim == 3:
        prefix = record.prefix_tokens
        prefix = getattr(model, "num_prefix_tokens", 0) if prefix is None else prefix
        n_tokens = features.shape[1] - prefix
        side = round(max(n_tokens, 0) ** 0.5)
        if not side or side**2 != n_tokens:
            return None
        return features[:, prefix:].reshape(-1, side, side, features.shape[2])
    # Swin and its like have their channels last already.
    width = int(model.num_features)
    maps = features if features.shape[-1] == width != features.shape[1] else features.permute(0, 2, 3, 1)
    return maps if maps.shape[1] == maps.shape[2] else None


def _cut(maps: Tensor, k: int) -> Tensor:
    """Cut maps ``(n, side, side, dim)`` into K x K parts each, ``(n * K * K, size, size, dim)``."""
    side, dim = maps.shape[2:]
    size = side // k
    parts = maps.reshape(-1, k, size, k, size, dim).transpose(2, 3)
    return parts.reshape(-1, size, size, dim)


def _head(model: Any, parts: Tensor, record: EncoderRecord, *, is_sequence: bool) -> Tensor:
    """Make one vector of each part ``(m, size, size, dim)``."""
    if is_sequence:
        means = parts.mean((1, 2))
        if record.pooling == "projection":
            projected: Tensor = model.projection(means)
            return projected
        # The norm that timm's transformers apply after averaging, where they do so; of the others it is the identity.
        norm = None if record.pooling in POOLED_TOKENS else getattr(model, "fc_norm", None)
        found: Tensor = means if norm is None else norm(means)
        return found.float()
    channels_last = getattr(model, "output_fmt", None) == "NHWC"
    head: Tensor = model.forward_head(parts if channels_last else parts.permute(0, 3, 1, 2))
    return head.flatten(1).float()


def _own_vector(model: Any, features: Tensor, record: EncoderRecord) -> Tensor:
    """Return the patch's own vector, as `architecture.pool` makes it, without a second pass."""
    if record.pooling not in POOLED_TOKENS:
        own: Tensor = model.forward_head(features)
        return own.float()
    return pool_tokens(model, features, record.pooling, record.prefix_tokens)
