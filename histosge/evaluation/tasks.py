"""One task per fold and seed: its spots, patches, genes and targets, the same for every method.

Genes are chosen here, on the training part of each fold, so no method can use a held-out count.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Self

import numpy as np
from numpy.typing import NDArray

from histosge.data.gene_choice import GeneChoice, GeneSource
from histosge.data.genes import library_size, select_target, shared_genes
from histosge.data.sections import Section, Spots, TrainingSection
from histosge.heldout.leakage import (
    PatchSplit,
    check_windows_apart,
    section_buffer_um,
    select_patches,
    select_spots,
)
from histosge.heldout.metrics import top_by_variance
from histosge.heldout.smooth_fields import LENGTHS, smooth_fields_on_grid, spot_pitch_um
from histosge.heldout.splits import WITHIN_SECTION, Fold, make_folds


@dataclass(frozen=True)
class Task:
    """One fold of one seed, ready to fit: the same for every preset.

    Parameters
    ----------
    seed, fold
        Which.
    genes
        Chosen on the fold's training part.
    sections
        All of them.
    targets
        log1p(CP10k) of all spots of each section, ``(n_spots, n_genes)``.
    patch_splits
        Slide id -> which patches training and held-out spots may see; empty: all.
    genes_are_chosen
        Whether all genes were chosen here, none given.
    is_noise
        Whether the embeddings are random.
    """

    seed: int
    fold: Fold
    genes: tuple[str, ...]
    sections: tuple[Section, ...]
    targets: tuple[NDArray[np.float32], ...]
    patch_splits: Mapping[str, PatchSplit] = field(default_factory=dict)
    genes_are_chosen: bool = True
    is_noise: bool = False

    def training(self) -> list[TrainingSection]:
        """Return the sections that have training spots, with those spots and the patches that they may see."""
        parts = []
        for section, target in self._sections_of(self.fold.train):
            keep = self.fold.train[section.slide_id]
            split = self.patch_splits.get(section.slide_id)
            seen = select_patches(section, split.train) if split else section
            # Of all spots, and then cut down with the rest by `subset`, so that the order stays that of the targets.
            library = library_size(seen.spots)
            parts.append(
                TrainingSection(
                    seen.patches, seen.overlap, seen.spots.xy_um, target, library, donor=seen.spots.donor
                ).subset(keep)
            )
        return parts

    def training_spots(self) -> list[Spots]:
        """Return the training spots with their counts, section by section as `training` gives them."""
        return [
            _subset(section.spots, self.fold.train[section.slide_id])
            for section, _ in self._sections_of(self.fold.train)
        ]

    def held_out(self) -> list[tuple[Section, NDArray[np.float32]]]:
        """Return the held-out spots with their targets, on the patches that they may see."""
        parts = []
        for section, target in self._sections_of(self.fold.test):
            keep = self.fold.test[section.slide_id]
            split = self.patch_splits.get(section.slide_id)
            seen = select_patches(section, split.test) if split else section
            parts.append((select_spots(seen, keep), target[keep]))
        return parts

    def all_spots(self) -> list[tuple[Section, NDArray[np.float32]]]:
        """Return all spots of all sections, those trained on included: only for `paper_all_spots`."""
        return list(zip(self.sections, self.targets, strict=True))

    def _sections_of(
        self, part: Mapping[str, NDArray[np.bool_]]
    ) -> list[tuple[Section, NDArray[np.float32]]]:
        """Return the sections that have spots in a part of the fold, with the targets of all their spots."""
        pairs = zip(self.sections, self.targets, strict=True)
        return [(section, target) for section, target in pairs if part[section.slide_id].any()]

    def top_genes(self) -> NDArray[np.bool_]:
        """Mark the genes behind `pearson_top50`, picked on the training spots."""
        pairs = self._sections_of(self.fold.train)
        return top_by_variance(np.concatenate([t[self.fold.train[s.slide_id]] for s, t in pairs]))

    def with_random_embeddings(self, draw: int) -> "Task":
        """Return the same fold on standard-normal random embeddings; the draw takes the seed's place."""
        # The number of sections enters, so that a draw on two sections is no part of the same draw on three.
        rng = np.random.default_rng([draw, len(self.sections)])
        noisy = []
        for section in self.sections:
            # Of the same shape: a control with fewer numbers to fit could hide a leak.
            random = rng.standard_normal(section.patches.embedding.shape, dtype=np.float32)
            noisy.append(replace(section, patches=section.patches.with_embedding(random)))
        return replace(self, seed=draw, sections=tuple(noisy), is_noise=True)

    def with_smooth_embeddings(self, draw: int) -> "Task":
        """Return the same fold on random embeddings that are smooth in space; the draw takes the seed's place.

        Feature by feature the correlation lengths are `LENGTHS` in turn, in pitches of the section's spots.
        """
        # Another stream than `with_random_embeddings` draws from.
        rng = np.random.default_rng([draw, len(self.sections), len(LENGTHS)])
        smooth = []
        for section in self.sections:
            patches = section.patches
            pitch = spot_pitch_um(section.spots.xy_um) / patches.stride_um
            embedding = np.empty(patches.embedding.shape, np.float32)
            for i, length in enumerate(LENGTHS):
                mine = embedding[:, i :: len(LENGTHS)]
                mine[:] = smooth_fields_on_grid(
                    patches.rows, patches.cols, length * pitch, mine.shape[1], rng
                )
            smooth.append(replace(section, patches=patches.with_embedding(embedding)))
        return replace(self, seed=draw, sections=tuple(smooth), is_noise=True)

    def with_genes(self, genes: Sequence[str]) -> "Task":
        """Return the same fold for other genes."""
        targets = tuple(select_target(section.spots, genes) for section in self.sections)
        return replace(self, genes=tuple(genes), targets=targets)

    def with_sections(self, sections: Sequence[Section]) -> "Task":
        """Return the same fold on the same spots and patches with other embeddings."""
        return replace(self, sections=tuple(sections))


@dataclass(frozen=True)
class Plan:
    """Folds per seed, and the genes that each fold's training part gives.

    Parameters
    ----------
    sections, split
        What to split, and how: one of `histosge.heldout.splits.SPLITS`.
    genes
        What is chosen on each fold's training part.
    buffer_um
        Of the block split.
    """

    sections: tuple[Section, ...]
    split: str
    genes: GeneChoice
    buffer_um: float

    @classmethod
    def from_sections(cls, sections: Sequence[Section], split: str, genes: GeneSource | GeneChoice) -> Self:
        """Plan an evaluation; the buffer of a block split comes from the widest spots and patches."""
        choice = genes if isinstance(genes, GeneChoice) else GeneChoice.parse(genes)
        # The widest of all: one buffer for all sections, as the report states one.
        buffers = [section_buffer_um(section) for section in sections]
        return cls(tuple(sections), split, choice, max(buffers, default=0.0) if split == "block" else 0.0)

    def folds(self, seed: int) -> tuple[Fold, ...]:
        """Return one seed's folds, checked for leaks."""
        spots = [section.spots for section in self.sections]
        return make_folds(self.split, spots, seed=seed, buffer_um=self.buffer_um)

    def tasks(self, seeds: Sequence[int]) -> Iterator[Task]:
        """Prepare every fold of every seed; folds that do not depend on the seed are prepared once."""
        prepared: list[Task] = []
        for seed in seeds:
            # Whole sections and donors are the same for every seed; choosing genes and checking takes seconds.
            if not prepared or self.split in WITHIN_SECTION:
                prepared = [self._prepare(seed, fold) for fold in self.folds(seed)]
            yield from (replace(task, seed=seed) for task in prepared)

    def _prepare(self, seed: int, fold: Fold) -> Task:
        genes = self._choose(fold)
        targets = tuple(select_target(section.spots, genes) for section in self.sections)
        # Whole slides share no patch; and of a random half nothing is claimed about new tissue.
        patch_splits = (
            {section.slide_id: _split_patches(fold, section) for section in self.sections}
            if self.split == "block"
            else {}
        )
        return Task(
            seed, fold, genes, self.sections, targets, patch_splits, genes_are_chosen=not self.genes.named
        )

    def _choose(self, fold: Fold) -> tuple[str, ...]:
        training = [
            _subset(section.spots, keep)
            for section in self.sections
            if (keep := fold.train[section.slide_id]).any()
        ]
        # Held-out sections decide which genes they measured, not what they counted: a gene that one lacks cannot be
        # scored there.
        measured = shared_genes([section.spots for section in self.sections])
        return self.genes.choose(training, among=measured)


def _split_patches(fold: Fold, section: Section) -> PatchSplit:
    """Split the patches, and check that no window of training reaches into one of a held-out spot."""
    train, test = fold.train[section.slide_id], fold.test[section.slide_id]
    split = PatchSplit.from_spots(section, train, test)
    check_windows_apart(section, split, train, test, fold.name)
    return split


def _subset(spots: Spots, keep: NDArray[np.bool_]) -> Spots:
    return replace(spots, barcodes=spots.barcodes[keep], xy_um=spots.xy_um[keep], counts=spots.counts[keep])
