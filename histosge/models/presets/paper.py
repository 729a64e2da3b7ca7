"""The published model behind our protocol: to be compared with, not to be used.

Kept as published: the network, its learned absolute positions, MSE on log1p(CP10k), Adam at 1e-3.
Mended: groups are spatial, positions are continuous, patches finer than spots are predicted, embeddings of
any scale are standardised. The first two can be had as published, by `PaperSwitches`, to see what they cost.

Terms
    pitch    distance from a spot to the next
    group    about 50 spots (or patches one pitch apart) that one attention call sees
    lattice  a spot's row and column: microns from the slide's top-left over the pitch, 0 .. 511
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from histosge.data.sections import Patches, TrainingSection
from histosge.errors import ModelError
from histosge.models.checkpoint import current
from histosge.models.linear_algebra import Floats, Indices, Standardiser
from histosge.models.protocol import State
from histosge.models.registry import ModelRecord

# torch is imported where it is used: the list of presets must not take its seconds.
if TYPE_CHECKING:
    import torch

    from histosge.models.paper_network import PaperNetwork

EPOCHS = 100
LEARNING_RATE = 1e-3
GROUP = 50
SIDE = 7
"""Patches along a side of a group in prediction: 49 to a group, one pitch apart."""
_GROUPS_AT_ONCE = 64


@dataclass(frozen=True)
class PaperSwitches:
    """Which defects of the released code to bring back.

    Parameters
    ----------
    file_order_groups
        A group is 50 consecutive rows of the file, wherever they lie; of a grid: 50 consecutive patches, row by
        row, one pitch apart.
    integer_coordinates
        Positions are cut down to whole lattice steps, so that what lies between two spots gets a spot's place.
    """

    file_order_groups: bool = False
    integer_coordinates: bool = False


@dataclass(frozen=True)
class PaperModel:
    """The published network with what it needs to meet a slide.

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
        Defects brought back; none in the preset.
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
        """Return the side of a group: a patch's whole group must be in sight."""
        return SIDE * _step(self.pitch_um, self.stride_um) * self.stride_um

    @classmethod
    def fit(cls, sections: Sequence[TrainingSection], *, seed: int = 0, epochs: int | None = None) -> Self:
        """Train, one group a step, in an order that the seed decides; `epochs` defaults to `EPOCHS`."""
        return cls.fit_with(PaperSwitches(), sections, seed=seed, epochs=epochs)

    @classmethod
    def fit_with(
        cls,
        switches: PaperSwitches,
        sections: Sequence[TrainingSection],
        *,
        seed: int = 0,
        epochs: int | None = None,
    ) -> Self:
        """Train with some defects of the released code."""
        import torch

        from histosge.models.paper_network import PaperNetwork

        epochs = EPOCHS if epochs is None else epochs
        standardiser, pitch_um = Standardiser.of(np.concatenate(_at_spots(sections))), spot_pitch(sections)
        groups = _groups(sections, standardiser, pitch_um, switches)
        dim, n_genes = groups[0][0].shape[2], groups[0][2].shape[2]
        # Layers draw their first weights from torch's global generator: borrow it, and give it back.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            network = PaperNetwork(dim, n_genes)
        _train(network, groups, np.random.default_rng(seed), epochs)
        return cls(network.eval(), standardiser, pitch_um, sections[0].patches.stride_um, epochs, switches)

    def predict(self, patches: Patches) -> NDArray[np.float32]:
        """Return log1p(CP10k) of every patch, ``(n_patches, n_genes)``.

        Patches a pitch apart form groups like those of training; the patches between them form others.
        """
        step = _step(self.pitch_um, patches.stride_um)
        groups = _in_rows(patches, step) if self.switches.file_order_groups else _interleaved(patches, step)
        return self._infer(patches.embedding, patches.xy_um, groups)

    def predict_spots(self, embedding: NDArray[np.floating], xy_um: Floats) -> NDArray[np.float32]:
        """Return log1p(CP10k) of spots themselves, as the released code does, ``(n_spots, n_genes)``.

        Parameters
        ----------
        embedding
            One per spot, ``(n_spots, dim)``.
        xy_um
            Their centres; spots are in the order of the file.
        """
        members = _members(xy_um, self.switches)
        groups = np.full((len(members), GROUP), -1, dtype=np.int64)
        for group, mine in zip(groups, members, strict=True):
            group[: len(mine)] = mine
        return self._infer(embedding, xy_um, groups)

    def _infer(self, embedding: NDArray[np.floating], xy_um: Floats, groups: Indices) -> NDArray[np.float32]:
        """Predict by groups, indices ``(n_groups, size)``, -1 for none."""
        import torch

        predicted = np.empty((len(embedding), self.network.n_genes), dtype=np.float32)
        position = torch.from_numpy(_positions(xy_um, self.pitch_um, self.switches))
        for start in range(0, len(groups), _GROUPS_AT_ONCE):
            index = groups[start : start + _GROUPS_AT_ONCE]
            inputs = torch.from_numpy(self.standardiser.apply(embedding[index]).astype(np.float32))
            with torch.inference_mode():
                values = self.network(inputs, position[index], torch.from_numpy(index >= 0)).numpy()
            predicted[index[index >= 0]] = values[index >= 0]
        return predicted

    def config(self) -> dict[str, Any]:
        """Return how it was trained."""
        about = {"pitch_um": self.pitch_um, "stride_um": self.stride_um, "epochs": self.epochs}
        return {**about, "switches": asdict(self.switches)}

    def state(self) -> State:
        """Return the network's weights and the standardiser."""
        arrays: State = {f"network.{k}": v.numpy() for k, v in self.network.state_dict().items()}
        return {
            **arrays,
            "embedding.mean": self.standardiser.mean,
            "embedding.scale": self.standardiser.scale,
        }

    @classmethod
    def from_state(cls, config: dict[str, Any], state: State) -> Self:
        """Rebuild."""
        import torch

        from histosge.models.paper_network import PaperNetwork

        weights = {
            name.removeprefix("network."): torch.from_numpy(np.array(array))
            for name, array in state.items()
            if name.startswith("network.")
        }
        with torch.random.fork_rng(devices=[]):
            network = PaperNetwork(weights["row.weight"].shape[1], weights["head.3.weight"].shape[0])
        network.load_state_dict(weights)
        standardiser = Standardiser(state["embedding.mean"], state["embedding.scale"])
        if "switches" not in config:
            raise ModelError(
                "this paper model was saved by an older version, with other positions: train it again"
            )
        switches = PaperSwitches(**config["switches"])
        return cls(
            network.eval(),
            standardiser,
            config["pitch_um"],
            config["stride_um"],
            config["epochs"],
            switches,
        )


Group: TypeAlias = "tuple[torch.Tensor, torch.Tensor, torch.Tensor]"
"""Embeddings, positions and targets of about 50 spots, ``(1, n_spots, ...)`` each."""


def _at_spots(sections: Sequence[TrainingSection]) -> list[Floats]:
    return [s.overlap @ s.patches.embedding.astype(np.float64) for s in sections]


def _groups(
    sections: Sequence[TrainingSection], standardiser: Standardiser, pitch_um: float, switches: PaperSwitches
) -> list[Group]:
    import torch

    groups = []
    for section, at_spots in zip(sections, _at_spots(sections), strict=True):
        embedding = torch.from_numpy(standardiser.apply(at_spots).astype(np.float32))
        position = torch.from_numpy(_positions(section.spot_xy_um, pitch_um, switches))
        target = torch.from_numpy(section.target)
        groups += [
            (embedding[members][None], position[members][None], target[members][None])
            for members in _members(section.spot_xy_um, switches)
        ]
    return groups


def _train(network: PaperNetwork, groups: list[Group], rng: np.random.Generator, epochs: int) -> None:
    """Train where that is fastest, and bring the network back to the processor."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    network.to(device)
    optimiser = torch.optim.Adam(network.parameters(), lr=LEARNING_RATE)
    checkpoint = current()
    done = checkpoint.restore(network, optimiser, rng) if checkpoint else 0
    for epoch in range(done, epochs):
        for number in rng.permutation(len(groups)):
            embedding, position, target = (part.to(device) for part in groups[number])
            exists = torch.ones(position.shape[:2], dtype=torch.bool, device=device)
            loss = ((network(embedding, position, exists) - target) ** 2).mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        if checkpoint:
            checkpoint.keep(epoch + 1, network, optimiser, rng)
    network.to("cpu")


def spot_pitch(sections: Sequence[TrainingSection]) -> float:
    """Return the median distance from a spot to its nearest neighbour, in microns.

    A lone spot has none: the grid's stride stands in.
    """
    stride_um = sections[0].patches.stride_um
    nearest = [cKDTree(s.spot_xy_um).query(s.spot_xy_um, k=[2])[0] for s in sections if len(s.spot_xy_um) > 1]
    return max(float(np.median(np.concatenate(nearest))), stride_um) if nearest else stride_um


def lattice_position(xy_um: Floats, pitch_um: float) -> NDArray[np.float32]:
    """Return ``(row, col)`` on the spots' lattice, continuous, ``(n, 2)``; beyond 511 it stays at 511.

    It counts from the slide's corner, so that a slide predicted block by block gives the same rows.
    """
    from histosge.models.paper_network import POSITIONS

    return np.clip(xy_um[:, ::-1] / pitch_um, 0, POSITIONS - 1).astype(np.float32)


def _positions(
    xy_um: Floats, pitch_um: float, switches: PaperSwitches
) -> NDArray[np.float32] | NDArray[np.int64]:
    position = lattice_position(xy_um, pitch_um)
    return position.astype(np.int64) if switches.integer_coordinates else position


def _members(xy_um: Floats, switches: PaperSwitches) -> list[Indices]:
    """Return the spots of each group."""
    if not switches.file_order_groups:
        return spatial_split(xy_um, GROUP)
    return [np.arange(start, min(start + GROUP, len(xy_um))) for start in range(0, len(xy_um), GROUP)]


def spatial_split(xy_um: Floats, size: int) -> list[Indices]:
    """Halve positions along their longer side until no part holds more than `size`."""
    parts, done = [np.arange(len(xy_um))], []
    while parts:
        part = parts.pop()
        if len(part) <= size:
            done.append(part)
            continue
        axis = int(np.ptp(xy_um[part], axis=0).argmax())
        order = part[np.argsort(xy_um[part, axis], kind="stable")]
        parts += [order[len(order) // 2 :], order[: len(order) // 2]]
    return done


def _step(pitch_um: float, stride_um: float) -> int:
    """Return how many patches lie from one spot to the next."""
    return max(1, round(pitch_um / stride_um))


def _interleaved(patches: Patches, step: int) -> Indices:
    """Group patches `step` apart, 7 x 7 to a group; return indices ``(n_groups, 49)``, -1 for none.

    Groups are anchored at the slide's corner: which patches share one does not depend on what else is read.
    """
    tile = SIDE * step
    place = (patches.rows % tile // step) * SIDE + patches.cols % tile // step
    key = np.stack([patches.rows // tile, patches.cols // tile, patches.rows % step, patches.cols % step])
    labels, group = np.unique(key, axis=1, return_inverse=True)
    index = np.full((labels.shape[1], SIDE * SIDE), -1, dtype=np.int64)
    index[group.ravel(), place] = np.arange(len(patches))
    return index


def _in_rows(patches: Patches, step: int) -> Indices:
    """Group patches `step` apart as a file lists them: row by row, 50 at a time, ``(n_groups, 50)``, -1 for none."""
    order = np.lexsort((patches.cols, patches.rows, patches.cols % step, patches.rows % step))
    lattice = (patches.rows % step * step + patches.cols % step)[order]
    groups = []
    for label in np.unique(lattice):
        members = order[lattice == label]
        padded = np.full(-(-len(members) // GROUP) * GROUP, -1, dtype=np.int64)
        padded[: len(members)] = members
        groups.append(padded.reshape(-1, GROUP))
    return np.concatenate(groups) if groups else np.empty((0, GROUP), dtype=np.int64)


RECORD = ModelRecord("paper", "The published HisToSGE network, trained for 100 epochs.", lambda: PaperModel)
