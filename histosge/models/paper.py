"""The published model (HisToSGE, arXiv 2407.20518) as a preset: for comparison, not for use.

Kept as published: the network, its learned absolute positions, mean squared error on log1p(CP10k), Adam at 0.001.
Corrected: groups are spatial, positions are continuous, patches finer than spots are predicted, embeddings of
any scale are standardised. The first two corrections can be switched off by `PaperSwitches`, to measure their effect.

Terms
    pitch    distance from a spot to the nearest one
    group    about 50 spots (or patches one pitch apart) that one attention call sees
    lattice  a spot's row and column: microns from the slide's top-left over the pitch, 0 .. 511
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any, ClassVar, Self

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray

from histosge.data.sections import Patches, TrainingSection
from histosge.data.spot_overlap import spot_embeddings, spot_pitch_um
from histosge.errors import ModelError
from histosge.models.checkpoint import Checkpoint
from histosge.models.linear_algebra import Floats, Indices, Standardiser
from histosge.models.nested_state import nest, read_config, take, unnest
from histosge.models.paper_network import GENE_DIM, POSITIONS, PaperNetwork
from histosge.models.protocol import State
from histosge.models.training_device import chosen_device

# The released code runs 1,000. On the public sections that gains 0.007 of Pearson at ten times the cost.
EPOCHS = 100
LEARNING_RATE = 1e-3
GROUP_SIZE = 50
"""Spots of a group, at most, as published."""
GROUP_SIDE = 7
"""Patches along a side of a group in prediction: 49 to a group, which is nearest to `GROUP_SIZE`."""
_GROUPS_AT_ONCE = 64


@dataclass(frozen=True)
class PaperSwitches:
    """Defects of the released code to reproduce.

    Parameters
    ----------
    file_order_groups
        A group is 50 consecutive rows of the file, wherever they lie; of a grid: 50 consecutive patches, row by
        row, one pitch apart.
    integer_coordinates
        Positions are truncated to whole lattice steps, so that a patch between two spots gets the position of one.
    """

    file_order_groups: bool = False
    integer_coordinates: bool = False


@dataclass(frozen=True)
class PaperModel:
    """The published network, with what it needs to predict a slide.

    Parameters
    ----------
    network
        Trained; used for inference only.
    standardiser
        Of the embeddings, measured on the training spots.
    pitch_um, stride_um
        Of the training spots, and of the grid.
    epochs
        Passes over the training spots.
    switches
        Defects reproduced; none in the preset.
    """

    name: ClassVar[str] = "paper"
    resumable: ClassVar[bool] = True
    # It takes minutes a fit.
    calibrated_by_default: ClassVar[bool] = False
    network: PaperNetwork
    standardiser: Standardiser
    pitch_um: float
    stride_um: float
    epochs: int
    switches: PaperSwitches = PaperSwitches()

    @property
    def halo_um(self) -> float:
        """Return the side of a group: a patch's prediction depends on its whole group."""
        return GROUP_SIDE * _step(self.pitch_um, self.stride_um) * self.stride_um

    @classmethod
    def fit(
        cls,
        sections: Sequence[TrainingSection],
        *,
        seed: int = 0,
        epochs: int | None = None,
        checkpoint: Checkpoint | None = None,
    ) -> Self:
        """Train, one group a step, in an order drawn from the seed; `epochs` defaults to `EPOCHS`."""
        return cls.fit_with(PaperSwitches(), sections, seed=seed, epochs=epochs, checkpoint=checkpoint)

    @classmethod
    def fit_with(
        cls,
        switches: PaperSwitches,
        sections: Sequence[TrainingSection],
        *,
        seed: int = 0,
        epochs: int | None = None,
        checkpoint: Checkpoint | None = None,
    ) -> Self:
        """Train with some defects of the released code; the other parameters are those of `fit`."""
        epochs = EPOCHS if epochs is None else epochs
        standardiser, pitch_um = Standardiser.fit(np.concatenate(_embeddings(sections))), _pitch(sections)
        groups = _groups(sections, standardiser, pitch_um, switches)
        dim, n_genes = groups[0][0].shape[2], groups[0][2].shape[2]
        # Layers draw their first weights from torch's global generator: it is seeded here, and given back as it was.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            network = PaperNetwork(dim, n_genes)
        _train(network, groups, np.random.default_rng(seed), epochs, checkpoint)
        return cls(network.eval(), standardiser, pitch_um, sections[0].patches.stride_um, epochs, switches)

    def predict(self, patches: Patches) -> NDArray[np.float32]:
        """Return log1p(CP10k) of every patch, ``(n_patches, n_genes)``.

        Patches a pitch apart form groups like those of training; the patches between them form other groups.
        """
        step = _step(self.pitch_um, patches.stride_um)
        form_groups = _file_order_groups if self.switches.file_order_groups else _square_groups
        groups = form_groups(patches, step)
        return self._infer(patches.embedding, patches.xy_um, groups)

    def predict_spots(self, embedding: NDArray[np.floating], xy_um: Floats) -> NDArray[np.float32]:
        """Return log1p(CP10k) of spots instead of patches, as the released code does, ``(n_spots, n_genes)``.

        Parameters
        ----------
        embedding
            One per spot, ``(n_spots, dim)``.
        xy_um
            Their centres; spots are in the order of the file.
        """
        spots_of_groups = _spot_groups(xy_um, self.switches)
        groups = np.full((len(spots_of_groups), GROUP_SIZE), -1, dtype=np.int64)
        for group, spots in zip(groups, spots_of_groups, strict=True):
            group[: len(spots)] = spots
        return self._infer(embedding, xy_um, groups)

    def _infer(self, embedding: NDArray[np.floating], xy_um: Floats, groups: Indices) -> NDArray[np.float32]:
        """Predict by groups, indices ``(n_groups, size)``, -1 for none."""
        predicted = np.empty((len(embedding), self.network.n_genes), dtype=np.float32)
        position = torch.from_numpy(_positions(xy_um, self.pitch_um, self.switches))
        for start in range(0, len(groups), _GROUPS_AT_ONCE):
            # Index -1, no patch, finds the last one: any finite embedding will do, since it is masked.
            index = groups[start : start + _GROUPS_AT_ONCE]
            inputs = torch.from_numpy(self.standardiser.apply(embedding[index]).astype(np.float32))
            with torch.inference_mode():
                values = self.network(inputs, position[index], torch.from_numpy(index >= 0)).numpy()
            predicted[index[index >= 0]] = values[index >= 0]
        return predicted

    def config(self) -> dict[str, Any]:
        """Return the settings of the training."""
        about = {"pitch_um": self.pitch_um, "stride_um": self.stride_um, "epochs": self.epochs}
        return {**about, "switches": asdict(self.switches)}

    def state(self) -> State:
        """Return the network's weights and the standardiser."""
        return {
            **nest("network", {name: v.numpy() for name, v in self.network.state_dict().items()}),
            "embedding.mean": self.standardiser.mean,
            "embedding.scale": self.standardiser.scale,
        }

    @classmethod
    def from_state(cls, config: dict[str, Any], state: State) -> Self:
        """Rebuild."""
        # Before a network of these sizes is made: torch would take the memory for any.
        dim = take(state, "network.row.weight", POSITIONS, None).shape[1]
        n_genes = take(state, "network.head.3.weight", None, GENE_DIM).shape[0]
        weights = {name: torch.from_numpy(np.array(v)) for name, v in unnest("network", state).items()}
        # Making a network draws weights, although they are replaced: the global generator is given back as it was.
        with torch.random.fork_rng(devices=[]):
            network = PaperNetwork(dim, n_genes)
        network.load_state_dict(weights)
        standardiser = Standardiser.from_state(state, "embedding")
        # Models of the first versions rounded positions to whole lattice steps: these would predict something else here.
        if "switches" not in config:
            raise ModelError(
                "this model of preset paper was saved by an older version that encoded positions differently; "
                "train it again with: histosge train --preset paper"
            )
        chosen = read_config(config, _Config)
        return cls(
            network.eval(),
            standardiser,
            chosen.pitch_um,
            chosen.stride_um,
            chosen.epochs,
            chosen.switches,
        )


class _Config(msgspec.Struct):
    """What `PaperModel.config` wrote. Bounds of the pitch are far beyond any assay's."""

    pitch_um: Annotated[float, msgspec.Meta(ge=0.1, le=1000)]
    stride_um: Annotated[float, msgspec.Meta(ge=0.1, le=1000)]
    epochs: int
    switches: PaperSwitches


Group = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Embeddings, positions and targets of about 50 spots, ``(1, n_spots, ...)`` each."""


def _embeddings(sections: Sequence[TrainingSection]) -> list[Floats]:
    return [spot_embeddings(s.overlap, s.patches) for s in sections]


def _pitch(sections: Sequence[TrainingSection]) -> float:
    """Return the spots' pitch in microns; the grid's stride where it is larger, or where no spot has a neighbour."""
    stride_um = sections[0].patches.stride_um
    pitch_um = spot_pitch_um(s.spot_xy_um for s in sections)
    return stride_um if pitch_um is None else max(pitch_um, stride_um)


def _groups(
    sections: Sequence[TrainingSection], standardiser: Standardiser, pitch_um: float, switches: PaperSwitches
) -> list[Group]:
    groups = []
    for section, embeddings in zip(sections, _embeddings(sections), strict=True):
        embedding = torch.from_numpy(standardiser.apply(embeddings).astype(np.float32))
        position = torch.from_numpy(_positions(section.spot_xy_um, pitch_um, switches))
        target = torch.from_numpy(section.target)
        groups += [
            (embedding[spots][None], position[spots][None], target[spots][None])
            for spots in _spot_groups(section.spot_xy_um, switches)
        ]
    return groups


def _train(
    network: PaperNetwork,
    groups: list[Group],
    rng: np.random.Generator,
    epochs: int,
    checkpoint: Checkpoint | None,
) -> None:
    """Train on the device that `training_device` chose; the network is on the CPU afterwards."""
    device = chosen_device()
    network.to(device)
    optimiser = torch.optim.Adam(network.parameters(), lr=LEARNING_RATE)
    done = checkpoint.restore(network, optimiser, rng) if checkpoint else 0
    for epoch in range(done, epochs):
        for number in rng.permutation(len(groups)):
            embedding, position, target = (part.to(device) for part in groups[number])
            # Training groups have no padding: they go one by one, as published, and may differ in size.
            exists = torch.ones(position.shape[:2], dtype=torch.bool, device=device)
            loss = ((network(embedding, position, exists) - target) ** 2).mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        if checkpoint:
            checkpoint.save(epoch + 1, network, optimiser, rng)
    network.to("cpu")


def lattice_position(xy_um: Floats, pitch_um: float) -> NDArray[np.float32]:
    """Return ``(row, col)`` on the spots' lattice, continuous, ``(n, 2)``, limited to 0 .. 511."""
    # Counted from the slide's corner, not from the first spot: a slide predicted block by block gives the same rows.
    # Reversed: (x, y) to (row, col).
    return np.clip(xy_um[:, ::-1] / pitch_um, 0, POSITIONS - 1).astype(np.float32)


def _positions(
    xy_um: Floats, pitch_um: float, switches: PaperSwitches
) -> NDArray[np.float32] | NDArray[np.int64]:
    position = lattice_position(xy_um, pitch_um)
    return position.astype(np.int64) if switches.integer_coordinates else position


def _spot_groups(xy_um: Floats, switches: PaperSwitches) -> list[Indices]:
    """Return the spots of each group."""
    if not switches.file_order_groups:
        return spatial_split(xy_um, GROUP_SIZE)
    starts = range(0, len(xy_um), GROUP_SIZE)
    return [np.arange(start, min(start + GROUP_SIZE, len(xy_um))) for start in starts]


def spatial_split(xy_um: Floats, size: int) -> list[Indices]:
    """Halve positions across their longer side until no part holds more than `size`; return indices of each part."""
    parts, done = [np.arange(len(xy_um))], []
    while parts:
        part = parts.pop()
        if len(part) <= size:
            done.append(part)
            continue
        axis = int(np.ptp(xy_um[part], axis=0).argmax())
        # A stable sort, so that positions at equal distance are split in the same way on every machine.
        order = part[np.argsort(xy_um[part, axis], kind="stable")]
        parts += [order[len(order) // 2 :], order[: len(order) // 2]]
    return done


def _step(pitch_um: float, stride_um: float) -> int:
    """Return how many patches a pitch spans, rounded, at least 1."""
    return max(1, round(pitch_um / stride_um))


def _square_groups(patches: Patches, step: int) -> Indices:
    """Group patches `step` apart, 7 x 7 to a group; return indices ``(n_groups, 49)``, -1 for none."""
    # Squares are laid from the slide's corner: which patches share one does not depend on which part of it is read.
    side = GROUP_SIDE * step
    place = (patches.rows % side // step) * GROUP_SIDE + patches.cols % side // step
    key = np.stack([patches.rows // side, patches.cols // side, patches.rows % step, patches.cols % step])
    labels, group = np.unique(key, axis=1, return_inverse=True)
    index = np.full((labels.shape[1], GROUP_SIDE * GROUP_SIDE), -1, dtype=np.int64)
    index[group.ravel(), place] = np.arange(len(patches))
    return index


def _file_order_groups(patches: Patches, step: int) -> Indices:
    """Group patches `step` apart row by row, as a file lists spots; return indices ``(n_groups, 50)``, -1 for none."""
    # The last key sorts first: by offset within a pitch, then row by row.
    order = np.lexsort((patches.cols, patches.rows, patches.cols % step, patches.rows % step))
    lattice = (patches.rows % step * step + patches.cols % step)[order]
    groups = []
    for label in np.unique(lattice):
        listed = order[lattice == label]
        padded = np.full(-(-len(listed) // GROUP_SIZE) * GROUP_SIZE, -1, dtype=np.int64)
        padded[: len(listed)] = listed
        groups.append(padded.reshape(-1, GROUP_SIZE))
    return np.concatenate(groups) if groups else np.empty((0, GROUP_SIZE), dtype=np.int64)
