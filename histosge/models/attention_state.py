"""What `AttentionModel` saves of its network, and how a network is made of it: as it was, or for other genes."""

from typing import Annotated, Any

import msgspec
import torch

from histosge.errors import ModelError
from histosge.models.block_network import BlockNetwork, NetworkShape
from histosge.models.dense import DenseModel
from histosge.models.linear_algebra import Indices
from histosge.models.nested_state import take
from histosge.models.network_fitting import load_network
from histosge.models.protocol import State

# Bounds far above what training makes, so that a file cannot take memory by its numbers alone.
_Radius = Annotated[float, msgspec.Meta(gt=0, le=2000)]


class NetworkSizes(msgspec.Struct):
    """Sizes that `AttentionModel.config` wrote."""

    width: Annotated[int, msgspec.Meta(ge=1, le=4096)]
    heads: Annotated[int, msgspec.Meta(ge=1, le=64)]
    radii_um: Annotated[tuple[_Radius, ...], msgspec.Meta(min_length=1, max_length=16)]


class AttentionConfig(msgspec.Struct):
    """What `AttentionModel.config` wrote."""

    dense: dict[str, Any]
    network: NetworkSizes | None
    training: dict[str, Any]


class TrainingFacts(msgspec.Struct):
    """What `remark` shows of the training."""

    epochs: int
    judging_change: list[float]
    reported_change: list[float]


def rebuild_network(sizes: NetworkSizes, state: State, dense: DenseModel, dim: int) -> BlockNetwork:
    """Make the network of a saved model from its sizes and arrays, whose shapes are checked first.

    Raises
    ------
    ModelError
        If they do not fit each other, or the genes and patterns of `dense`.
    """
    if sizes.width % sizes.heads:
        raise ModelError(f"the network's width {sizes.width} is no multiple of its {sizes.heads} heads")
    n_genes, n_patterns = dense.targets.axes.shape
    # Before a network of these sizes is made: torch would take the memory for any.
    take(state, "tokens.weight", sizes.width, dim)
    take(state, "residual.weight", n_genes, sizes.width)
    for layer in range(len(sizes.radii_um)):
        take(state, f"layers.{layer}.query.weight", sizes.width, sizes.width)
    shape = NetworkShape(dim, n_genes, n_patterns, sizes.width, sizes.heads, sizes.radii_um)
    return load_network(lambda: BlockNetwork(shape, dense.targets.axes, dense.targets.sd), state)


def network_with_genes(earlier: BlockNetwork, new: BlockNetwork, columns: Indices) -> BlockNetwork:
    """Give a new network the weights of an earlier one, for some of its genes and other patterns of these.

    Parameters
    ----------
    new
        Of the same sizes, but for genes and patterns; it is changed and returned.
    columns
        Of the earlier network's genes those of the new one.
    """
    with torch.no_grad():
        values = {**new.state_dict(), **_without_head(earlier)}
        at = torch.from_numpy(columns)
        # In units of the genes' spread, as `dense` is adapted. What the new patterns cannot express goes to the part of
        # the single genes.
        head = earlier.axes[at] @ earlier.patterns.weight + earlier.residual.weight[at]
        values["patterns.weight"] = new.axes.T @ earlier.axes[at] @ earlier.patterns.weight
        values["residual.weight"] = head - new.axes @ values["patterns.weight"]
        new.load_state_dict(values)
    return new


def _without_head(network: BlockNetwork) -> dict[str, torch.Tensor]:
    head = {"axes", "sd", "patterns.weight", "residual.weight"}
    return {name: value for name, value in network.state_dict().items() if name not in head}
