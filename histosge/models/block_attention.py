"""The preset `attention`: `dense`, and a transformer over blocks of the store that is added where it helps.

    patch    log1p(CP10k) = d + r            d: `dense`; r: the network, see `histosge.models.block_network`
    spot     log1p(mean over its disc of expm1(d + r))

The network is trained on what out-of-fold `dense` lacks, whole donors or sections at a time. Sections are divided into
parts (see `histosge.models.block_training`): those that it learns from, those that choose the epoch, those that decide
whether it is kept, and, from 8 on, some that decide nothing, whose error is reported. Where it is not kept the model is
`dense` to the bit.
"""

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar, Self
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from torch import Tensor

from featurestore.wording import counted
from histosge.data.embedded_slide import Reduce
from histosge.data.sections import Patches, TrainingSection
from histosge.data.spot_blocks import SectionBlocks, SpotBlocks
from histosge.models.attention_folds import donor_groups, out_of_fold
from histosge.models.attention_state import (
    AttentionConfig,
    TrainingFacts,
    network_with_genes,
    rebuild_network,
)
from histosge.models.block_network import BlockNetwork, single
from histosge.models.block_training import (
    MIN_GROUPS,
    AttentionSettings,
    DensePatches,
    Parts,
    PatchPredictions,
    TrainedNetwork,
    TrainingData,
    plan_patches,
    section_errors,
    split_sections,
    train_network,
)
from histosge.models.checkpoint import Checkpoint
from histosge.models.dense import DenseModel
from histosge.models.dense_attention import lower_limit
from histosge.models.gpu_memory import Division, MemoryLimit
from histosge.models.linear_algebra import Indices, Standardiser
from histosge.models.low_rank_targets import MAX_LOG
from histosge.models.nested_state import nest, read_config, unnest
from histosge.models.network_fitting import network_state
from histosge.models.prediction_device import chosen_device_name
from histosge.models.protocol import State
from histosge.models.ranks import current_ranks
from histosge.models.whitening import Whitening
from histosge.threads import usable_cores

_PATCHES_AT_ONCE = 4096
"""Patches whose neighbours are gathered together: 150 MB at the default radius on a grid of 56 um, 64 wide."""
_BY_PATCHES = Division[NDArray[Any]](
    len, lambda rows: (rows[: len(rows) // 2], rows[len(rows) // 2 :]), "patches"
)
_THREADS_GPU = 4
"""That prepare blocks for a GPU. Each holds a block, of 30 MB at 1,536 numbers and 1,000 genes."""


def preparing_threads(device: torch.device) -> int:
    """Return how many threads prepare blocks while a device computes."""
    # A step on a GPU is shorter than the preparation of a block by one core.
    return min(_THREADS_GPU, usable_cores()) if device.type == "cuda" else 1


@dataclass(frozen=True)
class AttentionModel:
    """log1p(CP10k) = clip(dense + network), clipped to what it can be.

    Parameters
    ----------
    dense
        The linear model.
    standardiser
        Of the embeddings, measured at the patches under training spots.
    network
        None where it did not help, or was not tried.
    facts
        Result of the training, JSON-ready, see `fit`; empty where nothing was tried.
    takes_tokens
        Whether embeddings are tokens of the network with projections of `dense` beside them, see `split`.
    """

    name: ClassVar[str] = "attention"
    resumable: ClassVar[bool] = True
    # Minutes a fit, and calibration takes up to four more fits.
    calibrated_by_default: ClassVar[bool] = False
    dense: DenseModel
    standardiser: Standardiser
    network: BlockNetwork | None
    facts: dict[str, Any] = field(default_factory=dict)
    takes_tokens: bool = False

    @property
    def halo_um(self) -> float:
        """Return how far the widest Gaussian of `dense`, or all layers together, reach."""
        return max(self.dense.halo_um, self.network.shape.halo_um if self.network else 0.0)

    @property
    def depth(self) -> object | None:
        """Return what predicts depth."""
        return self.dense.depth

    @property
    def remark(self) -> str:
        """Return in one line whether the network is used, and why."""
        if not self.facts:
            return (
                f"attention: not tried; it needs {MIN_GROUPS} sections, of {MIN_GROUPS} donors where donors are named, "
                "and genes that vary; the model equals dense"
            )
        judged = self.facts["judging_change"]
        shown = f"squared error on {len(judged)} held-out sections: {100 * np.mean(judged):+.1f} %"
        if self.facts["reported_change"]:
            rest = self.facts["reported_change"]
            shown += f"; on {len(rest)} more, which decided nothing: {100 * np.mean(rest):+.1f} %"
        verdict = (
            f"kept, after {counted(self.facts['epochs'], 'epoch')}"
            if self.network
            else "left out, as it does not reduce the error beyond chance; the model equals dense"
        )
        return f"attention: {verdict} ({shown})"

    @classmethod
    def fit(
        cls,
        sections: Sequence[TrainingSection],
        *,
        seed: int = 0,
        epochs: int | None = None,
        checkpoint: Checkpoint | None = None,
        settings: AttentionSettings | None = None,
    ) -> Self:
        """Fit `dense`, then train the network on what it lacks.

        `facts` are then the epochs kept; per epoch the loss and the error on the stopping part; and per section the
        relative change of squared error against out-of-fold `dense`, on the judging and on the reported part.

        Parameters
        ----------
        epochs
            At most; None means the settings'. The stopping part chooses among them.
        """
        settings = settings or AttentionSettings()
        if epochs is not None:
            settings = replace(settings, epochs=epochs)
        under = [s.patches.embedding[np.unique(s.overlap.indices)] for s in sections]
        every = -(-sum(map(len, under)) // _MAX_SAMPLE)
        standardiser = Standardiser.fit(np.concatenate(under)[::every].astype(np.float64))

        def fit_dense(some: Sequence[TrainingSection]) -> DenseModel:
            return DenseModel.fit(some, seed=seed)

        return cls._fit_sections(
            sections, fit_dense, standardiser, settings, seed=seed, checkpoint=checkpoint
        )

    def adapt(
        self,
        sections: Sequence[TrainingSection],
        fit_dense: Callable[[Sequence[TrainingSection]], DenseModel],
        columns: Indices,
        *,
        seed: int = 0,
        epochs: int | None = None,
        checkpoint: Checkpoint | None = None,
    ) -> Self:
        """Go on training from this model's network, on what an adapted `dense` lacks; keep it as `fit` does.

        Parameters
        ----------
        fit_dense
            Sections -> this model's `dense`, adapted to them.
        columns
            Of this model's genes those of the sections.
        """
        settings, network = AttentionSettings(), self.network
        if network is not None:
            shape = network.shape
            settings = replace(settings, radii_um=shape.radii_um, width=shape.width, heads=shape.heads)
        if epochs is not None:
            settings = replace(settings, epochs=epochs)

        def start(new: BlockNetwork) -> BlockNetwork:
            assert network is not None
            return network_with_genes(network, new, columns)

        # Its own standardiser: the network's tokens are of embeddings in its units.
        return self._fit_sections(
            sections,
            fit_dense,
            self.standardiser,
            settings,
            seed=seed,
            checkpoint=checkpoint,
            start=None if network is None else start,
        )

    @classmethod
    def _fit_sections(
        cls,
        sections: Sequence[TrainingSection],
        fit_dense: Callable[[Sequence[TrainingSection]], DenseModel],
        standardiser: Standardiser,
        settings: AttentionSettings,
        *,
        seed: int,
        checkpoint: Checkpoint | None,
        start: Callable[[BlockNetwork], BlockNetwork] | None = None,
    ) -> Self:
        groups = donor_groups([section.donor for section in sections])

        def fit_some(some: Indices) -> DenseModel:
            return fit_dense([sections[i] for i in some])

        def hold_out(dense: DenseModel, number: int) -> DensePatches:
            section = sections[number]
            under = np.unique(section.overlap.indices).astype(np.int64)
            patterns = dense.patterns_with_depth(section.patches, under)[0].astype(np.float32)
            overlap = sparse.csr_matrix(section.overlap[:, under])
            return DensePatches.from_spots(patterns, dense.to_genes, overlap, section.target)

        return cls.fit_blocks(
            lambda halo_um: SectionBlocks(sections, halo_um),
            groups,
            standardiser,
            fit_dense(sections),
            lambda: out_of_fold(groups, fit_some, hold_out),
            settings,
            seed=seed,
            checkpoint=checkpoint,
            start=start,
        )

    @classmethod
    def fit_blocks(
        cls,
        open_blocks: Callable[[float], SpotBlocks],
        groups: Indices,
        standardiser: Standardiser,
        dense: DenseModel,
        held_out: Callable[[], Sequence[PatchPredictions]],
        settings: AttentionSettings,
        *,
        seed: int = 0,
        checkpoint: Checkpoint | None = None,
        start: Callable[[BlockNetwork], BlockNetwork] | None = None,
    ) -> Self:
        """Train on blocks from any source.

        Parameters
        ----------
        open_blocks
            Halo in microns -> blocks.
        groups
            Of each section: what is held out together, ``(n_sections,)``.
        standardiser
            Of the embeddings.
        dense
            Fitted to all sections.
        held_out
            Returns the predictions of each section by a `dense` without it; called where a network is trained.
        start
            A new network -> the one that training starts from; None for the new one itself, which adds nothing.
        """
        parts = split_sections(groups, seed)
        if parts is None or not dense.targets.axes.any():
            return cls(dense, standardiser, None)
        device = settings.torch_device()
        data = TrainingData(
            open_blocks(sum(settings.radii_um)),
            held_out(),
            standardiser,
            dense.targets.sd,
            settings.radii_um,
            preparing_threads(device),
        )
        shape = settings.shape(len(standardiser.mean), *dense.targets.axes.shape)
        # Weights and dropout draw from torch's global generators: they are seeded here and in each step, and given back
        # as they were.
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.default_generator.manual_seed(seed)
            network = BlockNetwork(shape, dense.targets.axes, dense.targets.sd)
            if start is not None:
                network = start(network)
            of_training = data.of_sections(parts.training)
            if (whitening := Whitening.from_blocks(data.blocks, of_training, standardiser)) is not None:
                network.whiten(whitening, is_trained=start is not None)
            trained = train_network(network, data, parts, settings, seed=seed, checkpoint=checkpoint)
            trained.network.fold_whitening()
        return cls._judge(dense, standardiser, trained, data, parts, adds_nothing=start is None)

    @classmethod
    def _judge(
        cls,
        dense: DenseModel,
        standardiser: Standardiser,
        trained: TrainedNetwork,
        data: TrainingData,
        parts: Parts,
        *,
        adds_nothing: bool,
    ) -> Self:
        """Keep the network if sections that chose nothing gain from it beyond chance."""
        judging, reported = (
            relative_change(trained.network, data, part) for part in (parts.judging, parts.reported)
        )
        facts = {
            "epochs": trained.epochs,
            "loss": trained.loss,
            "stopping_error": trained.stopping_error,
            "judging_change": judging,
            "reported_change": reported,
            "sections": [len(part) for part in parts],
        }
        # The interval of the mean, not the mean alone: one section that gains much cannot pay for others that lose.
        # A new network adds nothing before its first epoch; an earlier one may be best as it was.
        kept = not (adds_nothing and trained.epochs == 0) and lower_limit([-change for change in judging]) > 0
        return cls(dense, standardiser, trained.network if kept else None, facts)

    def predict(self, patches: Patches) -> NDArray[np.float32]:
        """Return log1p(CP10k) of every patch, ``(n_patches, n_genes)``."""
        return self.predict_some(patches, np.arange(len(patches)))

    def predict_some(self, patches: Patches, of: Indices) -> NDArray[np.float32]:
        """Return what `predict` does for some of the patches; the others are only their neighbourhood."""
        return self.predict_with_depth(patches, of)[0]

    def predict_with_depth(
        self, patches: Patches, of: Indices
    ) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
        """Return `predict_some`, and the log of the total counts that a spot there would have, ``(len(of),)``."""
        if self.network is None:
            return self.dense.predict_with_depth(patches, of)
        tokens, own = patches, patches
        if self.takes_tokens:
            width = self.network.shape.width
            tokens = patches.with_embedding(patches.embedding[:, :width])
            own = patches.with_embedding(patches.embedding[:, width:])
        values, depth = self.dense.predict_with_depth(own, of)
        limit = MemoryLimit("--device cpu")
        for start in range(0, len(of), _PATCHES_AT_ONCE):
            part = slice(start, start + _PATCHES_AT_ONCE)
            added = limit.run(partial(self._added, tokens), of[part], _BY_PATCHES)
            values[part] += added[0] if len(added) == 1 else np.concatenate(added)
        return np.clip(values, 0, MAX_LOG, out=values), depth

    def _added(self, patches: Patches, of: Indices) -> NDArray[np.float32]:
        """Return what the network adds to some patches, ``(len(of), n_genes)``."""
        assert self.network is not None
        plan = plan_patches(patches, self.network.shape.radii_um, of)
        values = patches.embedding[plan.needed]
        network, device = network_here(self.network)
        with torch.inference_mode():
            tokens = torch.from_numpy(values if self.takes_tokens else self._tokens(values)).to(device)
            # Gathered windows on a GPU, too: they take a fifth of the memory of all pairs of so many patches.
            return np.asarray(network.from_tokens(tokens, plan.to(device), pairs=False).cpu().numpy())

    def _tokens(self, embedding: NDArray[np.floating]) -> NDArray[np.float32]:
        """Return the tokens of embeddings, ``(n, width)``."""
        assert self.network is not None
        network, device = network_here(self.network)

        def tokens(part: NDArray[np.floating]) -> Tensor:
            made: Tensor = network.tokens(single(self.standardiser.apply(part)).to(device)).cpu()
            return made

        limit, made = MemoryLimit("--device cpu"), list[Tensor]()
        with torch.inference_mode():
            for part in np.array_split(embedding, max(1, len(embedding) // _PATCHES_AT_ONCE)):
                made += limit.run(tokens, part, _BY_PATCHES)
            return np.asarray(torch.cat(made).numpy())

    def split(self) -> tuple[Reduce | None, "AttentionModel"]:
        """Return tokens and projections of embeddings, side by side, and the model that takes those."""
        # A patch lies in the windows of several blocks: its token is computed once.
        reduce, dense = self.dense.split()
        if self.network is None:
            return reduce, replace(self, dense=dense)

        def both(embedding: NDArray[np.float32]) -> NDArray[np.float32]:
            rest = embedding if reduce is None else reduce(embedding)
            return np.hstack([self._tokens(embedding), np.asarray(rest, np.float32)])

        return both, replace(self, dense=dense, takes_tokens=True)

    def config(self) -> dict[str, Any]:
        """Return what was chosen."""
        about = None
        if self.network is not None:
            shape = self.network.shape
            about = {"width": shape.width, "heads": shape.heads, "radii_um": list(shape.radii_um)}
        return {"dense": self.dense.config(), "network": about, "training": self.facts}

    def state(self) -> State:
        """Return the learned arrays."""
        arrays = nest("dense", self.dense.state())
        arrays |= {"embedding.mean": self.standardiser.mean, "embedding.scale": self.standardiser.scale}
        return arrays if self.network is None else arrays | nest("network", network_state(self.network))

    @classmethod
    def from_state(cls, config: dict[str, Any], state: State) -> Self:
        """Rebuild."""
        chosen = read_config(config, AttentionConfig)
        dense = DenseModel.from_state(chosen.dense, unnest("dense", state))
        standardiser, network = Standardiser.from_state(state, "embedding"), None
        if chosen.training:
            read_config(chosen.training, TrainingFacts)
        if chosen.network is not None:
            network = rebuild_network(chosen.network, unnest("network", state), dense, len(standardiser.mean))
        return cls(dense, standardiser, network, chosen.training)


_copies: "WeakKeyDictionary[BlockNetwork, BlockNetwork]" = WeakKeyDictionary()


def network_here(network: BlockNetwork) -> tuple[BlockNetwork, torch.device]:
    """Return a network on the device that predictions were chosen to be computed on; its copy there is made once."""
    device = torch.device(chosen_device_name())
    if device.type == "cpu":
        return network, device
    copied = _copies.get(network)
    if copied is None:
        # Not moved: the model may be predicted on the CPU, or saved, at the same time.
        copied = _copies[network] = deepcopy(network).to(device)
    return copied, device


_MAX_SAMPLE = 20_000
"""Patches that the embeddings' mean and standard deviation are measured on, at most."""


def relative_change(network: BlockNetwork, data: TrainingData, sections: Indices) -> list[float]:
    """Return the relative change of squared error that a network makes, of each section with spots."""
    numbers, device, ranks = data.of_sections(sections), torch.device("cpu"), current_ranks()
    before = section_errors(None, data, numbers, device, ranks)[0][sections]
    after = section_errors(network, data, numbers, device, ranks)[0][sections]
    return [float(b / a - 1) for a, b in zip(before, after, strict=True) if a > 0]
