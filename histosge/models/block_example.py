"""One block as tensors, ready for the network of `attention`: moved to a device, predicted, and divided by spots."""

from typing import NamedTuple, Self

import torch
from torch import Tensor

from histosge.models.block_network import BlockNetwork, BlockPlan, spot_prediction
from histosge.models.gpu_memory import Division
from histosge.models.low_rank_targets import MAX_LOG


class Example(NamedTuple):
    """A block: see `BlockNetwork.forward` and `spot_prediction`.

    Parameters
    ----------
    section
        Its section's index.
    embedding
        Standardised, of the patches that the plan needs, ``(n_needed, dim)``.
    plan
        Of the network's layers.
    dense, dense_spot
        By the linear model, of the patches under spots, ``(n_under, n_genes)``, and of the spots, ``(n_spots, n_genes)``.
    overlap
        Spot, patch and share of each patch under a spot, ``(n_pairs,)`` each.
    target
        log1p(CP10k) of the spots, ``(n_spots, n_genes)``.
    """

    section: int
    embedding: Tensor
    plan: BlockPlan
    dense: Tensor
    dense_spot: Tensor
    overlap: tuple[Tensor, Tensor, Tensor]
    target: Tensor

    def to(self, device: torch.device) -> Self:
        """Move all tensors."""
        if device.type == "cpu":
            return self
        return self._replace(
            embedding=self.embedding.to(device),
            plan=self.plan.to(device),
            dense=self.dense.to(device),
            dense_spot=self.dense_spot.to(device),
            overlap=(self.overlap[0].to(device), self.overlap[1].to(device), self.overlap[2].to(device)),
            target=self.target.to(device),
        )

    def predict(self, network: BlockNetwork) -> Tensor:
        """Return log1p(CP10k) of the spots, ``(n_spots, n_genes)``."""
        # bf16 on a GPU for the network alone: rates up to 10,000 need the digits of single precision.
        on_gpu = self.embedding.device.type == "cuda"
        with torch.autocast(self.embedding.device.type, torch.bfloat16, enabled=on_gpu):
            added = network(self.embedding, self.plan)
        return spot_prediction(self.dense_spot, self.dense, added.float(), self.overlap, float(MAX_LOG))

    def take(self, spots: Tensor) -> "Example":
        """Return some of the spots, with what their prediction needs: predicted, they are what they were among all."""
        spot, patch, share = self.overlap
        place = torch.full((len(self.target),), -1)
        place[spots] = torch.arange(len(spots))
        kept = place[spot] >= 0
        under, patch = torch.unique(patch[kept], return_inverse=True)
        plan, tokens = self.plan.take(under)
        return Example(
            self.section,
            self.embedding[tokens],
            plan,
            self.dense[under],
            self.dense_spot[spots],
            (place[spot[kept]], patch, share[kept]),
            self.target[spots],
        )

    def halves(self) -> tuple["Example", "Example"]:
        """Divide the spots across the longer side of the block, so that the two have few patches in common."""
        spot, patch, share = self.overlap
        last = self.plan.layers[-1]
        along = max((last.rows[last.own], last.cols[last.own]), key=lambda axis: int(axis.max() - axis.min()))
        at = torch.zeros(len(self.target)).index_add(0, spot, along[patch] * share)
        order = at.argsort(stable=True)
        return self.take(order[: len(order) // 2]), self.take(order[len(order) // 2 :])


BY_SPOTS = Division[Example](lambda example: len(example.target), Example.halves, "spots of a block")
"""How a block is divided where a GPU has too little memory for it."""
