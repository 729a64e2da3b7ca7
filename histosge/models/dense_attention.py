"""`dense` plus attention over the patches around, which is added only where it helps on held-out sections.

The linear part is fitted first. Its residuals, at spots of sections that it was fitted without, are fitted by three
networks, each without a third of the sections. Of each pattern the share is added that predicts the held-out thirds
best; and nothing at all unless the error falls by more than chance over the held-out parts (whole sections, or stripes of a
lone one). The held-out third has chosen the epoch as well, so the change of error that is reported is slightly too good: the
true gain is measured on sections that took no part.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Self

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats

from histosge.data.sections import Patches, TrainingSection
from histosge.data.spot_overlap import spot_embeddings
from histosge.models.attention import (
    EPOCHS,
    RADIUS_UM,
    WIDTH,
    AttentionNetwork,
    TrainingWindows,
    Windows,
    fit,
)
from histosge.models.dense import DenseModel, LinearFit
from histosge.models.earlier_dense import MomentProjection
from histosge.models.linear_algebra import Floats, Indices, Standardiser, spatial_groups
from histosge.models.multiscale import MultiscaleFeatures
from histosge.models.nested_state import nest, read_config, take, unnest
from histosge.models.protocol import State
from histosge.models.residual_kriging import choose_blend

N_FOLDS = 3
MIN_SPOTS = 200
"""Spots below which nothing is tried: a third of them would be too few to judge by."""
MAX_SPOTS = 20_000
"""Spots that networks are fitted to, at most, evenly over sections: windows of more would not fit a laptop's memory."""


CONFIDENCE = 0.95
"""Of the one-sided interval above whose lower end the mean reduction of error must lie for networks to be kept."""
_SHOWN_PARTS = 6


@dataclass(frozen=True)
class AttentionEnsemble:
    """The networks, and what they need.

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
        # Concatenating no windows at all is an error in torch.
        if len(of) == 0:
            return np.zeros((0, self.networks[0].out.out_features), np.float32)
        windows = Windows.from_patches(components, self.standardiser, self.radius_um, of)
        return windows.predict_mean(self.networks)


@dataclass(frozen=True)
class DenseAttentionModel:
    """log1p(CP10k) = soft_floor(mean + sd * axes @ (affine(features) + attention(components in the window))).

    Parameters
    ----------
    dense
        The linear part.
    components
        Embeddings -> principal components, which attention sees.
    attention
        What is added to its patterns; None where that did not help.
    facts
        Result of the trial on held-out folds, JSON-ready, see `fit`; empty where nothing was tried.
    """

    name: ClassVar[str] = "dense+attention"
    dense: DenseModel
    components: MultiscaleFeatures
    attention: AttentionEnsemble | None
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def halo_um(self) -> float:
        """Return how far the widest Gaussian or a window reaches."""
        return max(self.dense.halo_um, self.attention.radius_um if self.attention else 0.0)

    @property
    def depth(self) -> object | None:
        """Return what predicts depth."""
        return self.dense.depth

    @property
    def remark(self) -> str:
        """Return in one line whether attention is used, and why."""
        if not self.facts:
            return f"attention: not tried; it needs {MIN_SPOTS} spots, two sections or stripes, and genes that vary"
        changes = self.facts["error_change"]
        shown = ", ".join(f"{100 * change:+.1f} %" for change in changes[:_SHOWN_PARTS])
        more = f" and {len(changes) - _SHOWN_PARTS} more" if len(changes) > _SHOWN_PARTS else ""
        verdict = (
            "kept"
            if self.attention
            else "left out, as it does not reduce the error beyond chance; the model equals dense"
        )
        return f"attention: {verdict} (squared error on held-out parts: {shown}{more})"

    @classmethod
    def fit(
        cls,
        sections: Sequence[TrainingSection],
        *,
        seed: int = 0,
        epochs: int | None = None,
        radius_um: float = RADIUS_UM,
    ) -> Self:
        """Solve the linear part, then train networks on its residuals, for `EPOCHS` epochs.

        `facts` are then, per fold, the epochs kept of the patch alone and of its window; the relative change of squared
        error of each held-out part; the lower end of the mean reduction's confidence interval; and the share of each
        pattern that is added.
        """
        # Whole sections, or stripes of a lone one: attention has to help on tissue apart from its training spots.
        fold = spatial_groups(sections) % N_FOLDS
        linear, features = LinearFit.fit(sections, fold), MultiscaleFeatures.fit(sections)
        dense = DenseModel.from_linear_fit(linear, sections)
        if len(fold) < MIN_SPOTS or len(np.unique(fold)) < 2 or not linear.patterns.any():
            return cls(dense, features, None)
        # Residuals at a model's own training spots are smaller, and of another shape, than those on new tissue.
        assert linear.out_of_fold is not None
        residual = linear.patterns - linear.out_of_fold
        standardiser = _standardise(sections, features)

        def cut_windows(section: TrainingSection, spots: Indices, residual: Floats) -> TrainingWindows:
            components = features.components(section.patches)
            return TrainingWindows.from_patches(
                components, section.overlap[spots], residual[spots], standardiser, radius_um
            )

        windows = _windows_by_fold(
            sections, linear.by_section(residual), linear.by_section(fold), cut_windows
        )
        fits, predicted, truth = [], [], []
        for k, validation in windows.items():
            training = [section for j, others in windows.items() if j != k for section in others]
            fits.append(fit(training, validation, (seed, k), EPOCHS if epochs is None else epochs))
            # Part by part: a section that is held out as a whole is one place to be right or wrong at.
            predicted += [section.predict(fits[-1].network) for section in validation]
            truth += [section.residual for section in validation]
        blend = choose_blend(np.concatenate(truth), np.concatenate(predicted))
        change = [_relative_change(a, a - blend * b) for a, b in zip(truth, predicted, strict=True)]
        facts = {
            "epochs_alone": [one.patch_epochs for one in fits],
            "epochs_looking": [one.window_epochs for one in fits],
            "error_change": change,
            "least_gain": lower_limit([-each for each in change]),
            "blend": blend.tolist(),
        }
        # The interval, not the mean alone: one section that gains much cannot pay for others that lose. And not every
        # part: on many sections a true gain is lost on one of them by chance.
        if not facts["least_gain"] > 0:
            return cls(dense, features, None, facts)
        # The shares go into the last layer, so that prediction need not know them.
        with torch.no_grad():
            for one in fits:
                one.network.out.weight *= torch.from_numpy(blend.astype(np.float32))[:, None]
        ensemble = AttentionEnsemble(standardiser, tuple(one.network for one in fits), radius_um)
        return cls(dense, features, ensemble, facts)

    def predict(self, patches: Patches) -> NDArray[np.float32]:
        """Return log1p(CP10k) of every patch, ``(n_patches, n_genes)``."""
        return self.predict_some(patches, np.arange(len(patches)))

    def predict_some(self, patches: Patches, of: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return what `predict` does for some of the patches; the others are only their neighbourhood."""
        return self.predict_with_depth(patches, of)[0]

    def predict_with_depth(
        self, patches: Patches, of: NDArray[np.int64]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
        """Return `predict_some`, and the log of the total counts that a spot there would have, ``(len(of),)``."""
        patterns, depth = self.dense.patterns_with_depth(patches, of)
        if self.attention is not None:
            patterns = patterns + self.attention(self.components.components(patches), of)
        return self.dense.to_genes(patterns), depth

    def config(self) -> dict[str, Any]:
        """Return what was chosen."""
        kept = self.attention
        about = {"networks": len(kept.networks), "radius_um": kept.radius_um} if kept else None
        return {"image": self.dense.config(), "attention": about, "tried": self.facts}

    def state(self) -> State:
        """Return the learned arrays."""
        arrays = nest("image", self.dense.state())
        if not isinstance(self.dense.linear, MomentProjection):
            arrays |= nest("window", self.components.state())
        if self.attention is not None:
            arrays["components.mean"] = self.attention.standardiser.mean
            arrays["components.scale"] = self.attention.standardiser.scale
            for k, network in enumerate(self.attention.networks):
                arrays |= nest(f"network{k}", {name: v.numpy() for name, v in network.state_dict().items()})
        return arrays

    @classmethod
    def from_state(cls, config: dict[str, Any], state: State) -> Self:
        """Rebuild."""
        chosen = read_config(config, _Config)
        dense, attention = DenseModel.from_state(chosen.image, unnest("image", state)), None
        # In models of earlier versions the linear part sees the same components.
        earlier = dense.linear
        features = (
            earlier.features
            if isinstance(earlier, MomentProjection)
            else MultiscaleFeatures.from_state(unnest("window", state))
        )
        if chosen.attention is not None:
            n_components, n_patterns = len(features.centre), dense.targets.axes.shape[1]
            networks = tuple(
                _rebuild(unnest(f"network{k}", state), n_components, n_patterns)
                for k in range(chosen.attention.networks)
            )
            take(state, "components.mean", n_components)
            standardiser = Standardiser.from_state(state, "components")
            attention = AttentionEnsemble(standardiser, networks, chosen.attention.radius_um)
        if chosen.tried:
            read_config(chosen.tried, _Tried)
        return cls(dense, features, attention, chosen.tried)


class _Attention(msgspec.Struct):
    """Networks that are averaged, and half the side of a window. Bounds are far above what training makes."""

    networks: Annotated[int, msgspec.Meta(ge=1, le=64)]
    radius_um: Annotated[float, msgspec.Meta(ge=0, le=5000)]


class _Config(msgspec.Struct):
    """What `DenseAttentionModel.config` wrote."""

    image: dict[str, Any]
    attention: _Attention | None
    tried: dict[str, Any]


class _Tried(msgspec.Struct):
    """What `remark` shows of the trial."""

    error_change: list[float]


def _rebuild(state: State, n_components: int, n_patterns: int) -> AttentionNetwork:
    # Before a network of these sizes is made: torch would take the memory for any.
    take(state, "tokens.weight", WIDTH, n_components)
    take(state, "out.weight", n_patterns, WIDTH)
    weights = {name: torch.from_numpy(np.array(array)) for name, array in state.items()}
    # Making a network draws weights, although they are replaced: the global generator is given back as it was.
    with torch.random.fork_rng(devices=[]):
        network = AttentionNetwork(n_components, n_patterns)
    network.load_state_dict(weights)
    return network.eval()


def _standardise(sections: Sequence[TrainingSection], features: MultiscaleFeatures) -> Standardiser:
    """Measure the components at the training spots."""
    return Standardiser.fit(
        np.concatenate([spot_embeddings(s.overlap, features.components(s.patches)) for s in sections])
    )


def _windows_by_fold(
    sections: Sequence[TrainingSection],
    residual: Sequence[Floats],
    fold: Sequence[Indices],
    cut_windows: Callable[[TrainingSection, Indices, Floats], TrainingWindows],
) -> dict[int, list[TrainingWindows]]:
    """Return the sections of each fold, or stripes of the lone one, with at most `MAX_SPOTS` of all spots."""
    # Every k-th spot of each fold, so that no section is over-represented.
    every = -(-sum(map(len, fold)) // MAX_SPOTS)
    windows = {int(k): list[TrainingWindows]() for k in np.unique(np.concatenate(fold))}
    for section, own_residual, own_fold in zip(sections, residual, fold, strict=True):
        for k in np.unique(own_fold):
            spots = np.flatnonzero(own_fold == k)[::every]
            windows[int(k)].append(cut_windows(section, spots, own_residual))
    return windows


def lower_limit(gains: Sequence[float]) -> float:
    """Return the lower end of the one-sided confidence interval of a mean, by Student's t; 0 below two values.

    Parameters
    ----------
    gains
        Of each held-out part, taken as independent.
    """
    if len(gains) < 2:
        return 0.0
    error = float(np.std(gains, ddof=1)) / np.sqrt(len(gains))
    return float(np.mean(gains) - stats.t.ppf(CONFIDENCE, len(gains) - 1) * error)


def _relative_change(before: Floats, after: Floats) -> float:
    """Return the relative change of squared error; 0 where there was no error."""
    error = float((before**2).sum())
    return float((after**2).sum()) / error - 1 if error > 0 else 0.0
