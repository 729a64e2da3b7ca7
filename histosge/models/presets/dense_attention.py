"""`dense`, and what attention over the patches around adds to it: kept only where it helps on sections left out.

The linear part is fitted first. What it leaves at spots of sections that it was fitted without is learned by three
networks, each without a third of the sections. Of each pattern so much is added as predicts those best; and nothing
at all unless the error falls on every third. The third that judges has chosen the epoch, too: how much is gained is seen
on tissue that had no say. What was done is said.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from histosge.data.embedded_slide import Reduce
from histosge.data.sections import Patches, TrainingSection
from histosge.models.linear_algebra import Floats, Indices, Standardiser
from histosge.models.multiscale import Surroundings
from histosge.models.presets.dense import DenseModel, LinearFit
from histosge.models.protocol import State
from histosge.models.registry import ModelRecord
from histosge.models.residual_kriging import choose_blend

# torch is imported where it is used: the list of presets must not take its seconds.
if TYPE_CHECKING:
    from histosge.models.attention import AttentionNetwork, Lesson

FOLDS = 3
MIN_SPOTS = 200
"""Spots below which nothing is tried: a third of them would say little."""
MAX_SPOTS = 20_000
"""Spots that networks learn from, at most, evenly over sections: windows of more would not fit a laptop."""


@dataclass(frozen=True)
class Attention:
    """The networks, and what they take.

    Parameters
    ----------
    standardiser
        Of the components, measured at the training spots.
    networks
        One per fold; their mean is added to the patterns.
    radius_um
        Half the side of a window.
    """

    standardiser: Standardiser
    networks: tuple[AttentionNetwork, ...]
    radius_um: float

    def __call__(self, components: Patches, of: Indices) -> NDArray[np.float32]:
        """Return what to add to the patterns of some patches, ``(len(of), n_patterns)``."""
        from histosge.models.attention import Windows

        if len(of) == 0:
            return np.zeros((0, self.networks[0].out.out_features), np.float32)
        return Windows.around(components, self.standardiser, self.radius_um, of).ask_all(self.networks)


@dataclass(frozen=True)
class DenseAttentionModel:
    """log1p(CP10k) = bend(mean + sd * axes @ (affine(views) + attention(components around))).

    Parameters
    ----------
    image
        The linear part.
    attention
        What is added to its patterns; None where that did not help.
    facts
        What was tried and what came of it, JSON-ready: ``fit`` says how to read it.
    """

    name: ClassVar[str] = "dense+attention"
    image: DenseModel
    attention: Attention | None
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def halo_um(self) -> float:
        """Return how far the widest Gaussian or a window reaches."""
        return max(self.image.halo_um, self.attention.radius_um if self.attention else 0.0)

    @property
    def depth(self) -> object | None:
        """Return what predicts depth."""
        return self.image.depth

    @property
    def remark(self) -> str:
        """OnMessage in one line what attention did."""
        if not self.facts:
            return (
                f"attention: not tried, it takes {MIN_SPOTS} spots in two parts or more, and genes that vary"
            )
        changes = ", ".join(f"{100 * change:+.1f} %" for change in self.facts["error_change"])
        verdict = (
            "kept" if self.attention else "left out, as it does not help on every part; the map is dense's"
        )
        return f"attention: {verdict} (squared error on parts left out: {changes})"

    @classmethod
    def fit(
        cls,
        sections: Sequence[TrainingSection],
        *,
        seed: int = 0,
        epochs: int | None = None,
        radius_um: float | None = None,
    ) -> Self:
        """Solve the linear part, then train networks on what it leaves over, for `EPOCHS` epochs.

        `facts` are then, per fold, the epochs kept of the patch alone and of its window and the relative change of
        squared error; and the share of each pattern that is added.
        """
        import torch

        from histosge.models.attention import EPOCHS, RADIUS_UM, Lesson, teach

        radius = RADIUS_UM if radius_um is None else radius_um
        linear = LinearFit.of(sections)
        image = DenseModel.of(linear, sections, seed=seed)
        fold = linear.groups % FOLDS
        if len(fold) < MIN_SPOTS or len(np.unique(fold)) < 2 or not linear.patterns.any():
            return cls(image, None)
        leftover = linear.patterns - linear.unseen(fold)
        standardiser = _standardise(sections, linear.surroundings)

        def lesson(section: TrainingSection, spots: Indices, left: Floats) -> Lesson:
            components = linear.surroundings.components(section.patches)
            return Lesson.of(components, section.overlap[spots], left[spots], standardiser, radius)

        lessons = _lessons(sections, linear.split(leftover), linear.split(fold), lesson)
        taught, unseen, left = [], [], []
        for k, check in lessons.items():
            others = [one for j, some in lessons.items() if j != k for one in some]
            taught.append(teach(others, check, (seed, k), EPOCHS if epochs is None else epochs))
            unseen.append(np.concatenate([one.predict(taught[-1].network) for one in check]))
            left.append(np.concatenate([one.leftover for one in check]))
        blend = choose_blend(np.concatenate(left), np.concatenate(unseen))
        change = [_change(a, a - blend * b) for a, b in zip(left, unseen, strict=True)]
        facts = {
            "epochs_alone": [one.alone for one in taught],
            "epochs_looking": [one.looking for one in taught],
            "error_change": change,
            "blend": blend.tolist(),
        }
        if max(change) >= 0:
            return cls(image, None, facts)
        with torch.no_grad():
            for one in taught:
                one.network.out.weight *= torch.from_numpy(blend.astype(np.float32))[:, None]
        return cls(image, Attention(standardiser, tuple(one.network for one in taught), radius), facts)

    def predict(self, patches: Patches) -> NDArray[np.float32]:
        """Return log1p(CP10k) of every patch, ``(n_patches, n_genes)``."""
        return self.predict_some(patches, np.arange(len(patches)))

    def predict_some(self, patches: Patches, of: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return what `predict` does for some of the patches; the others are only looked at."""
        return self.predict_with_depth(patches, of)[0]

    def predict_with_depth(
        self, patches: Patches, of: NDArray[np.int64]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
        """Return `predict_some`, and the log of the total counts that a spot there would have, ``(len(of),)``."""
        components = self.image.surroundings.components(patches)
        _, image = self.image.split()
        patterns, depth = image.patterns_with_depth(components, of)
        if self.attention is not None:
            patterns = patterns + self.attention(components, of)
        return image.genes(patterns), depth

    def split(self) -> tuple[Reduce | None, DenseAttentionModel]:
        """Return what reduces embeddings to components, and the model that takes those."""
        reduce, image = self.image.split()
        return reduce, replace(self, image=image)

    def config(self) -> dict[str, Any]:
        """Return what was chosen."""
        added = self.attention
        kept = {"networks": len(added.networks), "radius_um": added.radius_um} if added else None
        return {"image": self.image.config(), "attention": kept, "tried": self.facts}

    def state(self) -> State:
        """Return the learned arrays."""
        arrays = {f"image.{name}": array for name, array in self.image.state().items()}
        if self.attention is not None:
            arrays["components.mean"] = self.attention.standardiser.mean
            arrays["components.scale"] = self.attention.standardiser.scale
            for k, network in enumerate(self.attention.networks):
                arrays |= {f"network{k}.{name}": v.numpy() for name, v in network.state_dict().items()}
        return arrays

    @classmethod
    def from_state(cls, config: dict[str, Any], state: State) -> Self:
        """Rebuild."""

        def part(prefix: str) -> State:
            return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}

        image, attention = DenseModel.from_state(config["image"], part("image.")), None
        if kept := config["attention"]:
            networks = tuple(_rebuilt(part(f"network{k}.")) for k in range(kept["networks"]))
            standardiser = Standardiser(state["components.mean"], state["components.scale"])
            attention = Attention(standardiser, networks, kept["radius_um"])
        return cls(image, attention, config["tried"])


def _rebuilt(state: State) -> AttentionNetwork:
    import torch

    from histosge.models.attention import AttentionNetwork

    weights = {name: torch.from_numpy(np.array(array)) for name, array in state.items()}
    with torch.random.fork_rng(devices=[]):
        network = AttentionNetwork(weights["tokens.weight"].shape[1], weights["out.weight"].shape[0])
    network.load_state_dict(weights)
    return network.eval()


def _standardise(sections: Sequence[TrainingSection], surroundings: Surroundings) -> Standardiser:
    """Measure the components at the training spots."""
    return Standardiser.of(
        np.concatenate(
            [s.overlap @ surroundings.components(s.patches).embedding.astype(np.float64) for s in sections]
        )
    )


def _lessons(
    sections: Sequence[TrainingSection],
    leftover: Sequence[Floats],
    fold: Sequence[Indices],
    lesson: Callable[[TrainingSection, Indices, Floats], Lesson],
) -> dict[int, list[Lesson]]:
    """Return each fold's sections, or parts of the lone one, with at most `MAX_SPOTS` of all spots."""
    every = -(-sum(map(len, fold)) // MAX_SPOTS)
    lessons: dict[int, list[Lesson]] = {int(k): [] for k in np.unique(np.concatenate(fold))}
    for section, left, label in zip(sections, leftover, fold, strict=True):
        for k in np.unique(label):
            lessons[int(k)].append(lesson(section, np.flatnonzero(label == k)[::every], left))
    return lessons


def _change(before: Floats, after: Floats) -> float:
    """Return the relative change of squared error; none where there was no error."""
    error = float((before**2).sum())
    return float((after**2).sum()) / error - 1 if error > 0 else 0.0


RECORD = ModelRecord(
    "dense+attention",
    "dense, plus attention over the patches around, where held-out sections gain from it.",
    lambda: DenseAttentionModel,
)
