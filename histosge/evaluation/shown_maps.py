"""Which held-out maps a report shows, collected fold by fold without keeping whole predictions.

The section with the most held-out spots is drawn with three genes; the page draws any gene of every section from what
`section_maps` packs. All are of one preset and one seed. Each patch is predicted by the fold that holds out the nearest
held-out spot. Genes are picked by held-out score; nothing else about them is looked at.

It fits nothing and draws nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Self

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from histosge.data.sections import Section
from histosge.evaluation.results import GeneMap
from histosge.evaluation.section_maps import MapBudget, SectionMapCollector, SectionPrediction
from histosge.heldout.splits import Fold
from histosge.reporting.value_maps import PackedMaps


@dataclass(frozen=True)
class FoldPrediction:
    """One fold's prediction of the shown section.

    Parameters
    ----------
    genes, pearson
        The fold's genes, and their held-out scores, ``(n_genes,)``.
    target
        log1p(CP10k) of all spots of the section, ``(n_spots, n_genes)``.
    predicted
        log1p(CP10k) of the patches that are this fold's to predict, ``(n_own, n_genes)``.
    """

    genes: tuple[str, ...]
    pearson: NDArray[np.float64]
    target: NDArray[np.float32]
    predicted: NDArray[np.float32]


@dataclass(frozen=True)
class HeldOutMaps:
    """Collects one section's held-out predictions, fold by fold.

    Parameters
    ----------
    section
        The one that is shown.
    spot_fold, patch_fold
        Fold that holds out each spot, and each patch's nearest held-out spot, by name; empty for spots
        that no fold holds out. Shapes ``(n_spots,)`` and ``(n_patches,)``.
    predictions
        Fold name -> its prediction, reduced to the patches that are this fold's to predict.
    """

    section: Section
    spot_fold: NDArray[np.object_]
    patch_fold: NDArray[np.object_]
    predictions: dict[str, FoldPrediction] = field(default_factory=dict)

    @classmethod
    def for_section(cls, section: Section, folds: Sequence[Fold]) -> Self:
        """Find out which fold predicts each patch of a section."""
        return cls(section, spot_folds(section, folds), patch_folds(section, folds))

    def add(self, fold: Fold, prediction: FoldPrediction) -> None:
        """Add a fold's prediction of the shown section, cut down to the patches that are this fold's to predict."""
        self.predictions[fold.name] = prediction

    def maps(self) -> tuple[GeneMap, ...]:
        """Return the maps of the best, the median and the worst gene, fewer if there are fewer genes.

        Only genes that every fold of this section has chosen can be shown.
        """
        ranked = self._ranked()
        roles = {"best": 0, "median": len(ranked) // 2, "worst": len(ranked) - 1}
        shown: dict[int, str] = {}
        for role, place in roles.items():
            # Of fewer than three genes one plays two roles: it is shown once, under the first.
            shown.setdefault(place, role)
        return tuple(self._map(ranked[place], role) for place, role in shown.items() if ranked)

    def _ranked(self) -> list[str]:
        """Return the genes that every fold of this section has, best first."""
        if not self.predictions:
            return []
        # Each fold chooses its own genes; a gene that one lacks would leave a hole in the map.
        common = set.intersection(*(set(part.genes) for part in self.predictions.values()))
        # Ties by name, so that the same scores show the same genes.
        return sorted(common, key=lambda gene: (-self._pearson(gene), gene))

    def _pearson(self, gene: str) -> float:
        """Return a gene's held-out score: the mean over the folds that hold out spots of this section."""
        return float(np.mean([part.pearson[part.genes.index(gene)] for part in self.predictions.values()]))

    def _map(self, gene: str, role: str) -> GeneMap:
        section = self.section
        measured = np.full(len(section.spots), np.nan, dtype=np.float32)
        patches = np.full(len(section.patches), np.nan, dtype=np.float32)
        for name, part in self.predictions.items():
            column = part.genes.index(gene)
            held_out_here = self.spot_fold == name
            measured[held_out_here] = part.target[held_out_here, column]
            patches[self.patch_fold == name] = part.predicted[:, column]
        grid = np.full(section.thumbnail.shape[:2], np.nan, dtype=np.float32)
        grid[section.patches.rows, section.patches.cols] = patches
        held_out = ~np.isnan(measured)
        return GeneMap(
            gene=gene,
            role=role,
            pearson=self._pearson(gene),
            slide_id=section.slide_id,
            spot_xy_um=section.spots.xy_um[held_out],
            measured=measured[held_out],
            spot_um=section.spots.diameter_um,
            predicted=grid,
            thumbnail=section.thumbnail,
            stride_um=section.patches.stride_um,
            patch_um=section.patches.patch_um,
            origin_um=section.patches.origin_um,
        )


class EvaluationMaps:
    """Collects the maps of all sections while folds go by.

    Parameters
    ----------
    sections, folds
        Of one seed.
    first
        Genes whose maps are kept before others, such as those that a user named.
    """

    def __init__(self, sections: Sequence[Section], folds: Sequence[Fold], first: Sequence[str] = ()) -> None:
        counts = [sum(int(fold.test[section.slide_id].sum()) for fold in folds) for section in sections]
        # The first of several: sections come in the order of their ids.
        best = sections[int(np.argmax(counts))]
        self._best = HeldOutMaps.for_section(best, folds)
        # In this order they are kept where not all fit.
        others = [s for s, n in zip(sections, counts, strict=True) if n and s is not best]
        self._sections = {section.slide_id: section for section in (best, *others)}
        self._owners = {slide_id: patch_folds(section, folds) for slide_id, section in self._sections.items()}
        self._first = tuple(first)
        self._collectors: dict[str, SectionMapCollector] | None = None

    def start_fold(self, genes: Sequence[str], pearson: NDArray[np.float64]) -> None:
        """Choose what is kept of all maps, by the first fold's genes and their held-out scores, ``(n_genes,)``."""
        if self._collectors is not None:
            return
        ranked = [genes[i] for i in np.argsort(-pearson, kind="stable")]
        budget = MapBudget.choose(list(self._sections.values()), ranked, self._first)
        self._collectors = {
            slide_id: SectionMapCollector(section, budget)
            for slide_id, section in self._sections.items()
            if slide_id in budget.slide_ids
        }

    def owned_patches(self, slide_id: str, fold: Fold) -> NDArray[np.bool_] | None:
        """Return which patches are this fold's to predict, ``(n_patches,)``; None where no map of the section is kept."""
        if slide_id not in (self._collectors or ()) or not fold.test[slide_id].any():
            return None
        return np.asarray(self._owners[slide_id] == fold.name)

    def add(
        self,
        fold: Fold,
        slide_id: str,
        prediction: SectionPrediction,
        pearson: NDArray[np.float64],
        target: NDArray[np.float32],
    ) -> None:
        """Add a fold's prediction of one section, of the patches that `owned_patches` gave.

        Parameters
        ----------
        pearson
            The fold's held-out scores, ``(n_genes,)``.
        target
            log1p(CP10k) of all spots of the section, ``(n_spots, n_genes)``.
        """
        assert self._collectors is not None
        self._collectors[slide_id].add(prediction)
        if slide_id == self._best.section.slide_id:
            self._best.add(fold, FoldPrediction(prediction.genes, pearson, target, prediction.predicted))

    def notes(self) -> tuple[str, ...]:
        """Return a sentence where not all sections have maps."""
        if self._collectors is None or len(self._collectors) == len(self._sections):
            return ()
        note = (
            f"Maps: {len(self._collectors)} of {len(self._sections)} sections have them, so that the page stays small;"
            " scores are of all. A sample sheet of fewer sections shows the others."
        )
        return (note,)

    def drawn(self) -> tuple[GeneMap, ...]:
        """Return the maps of the best, the median and the worst gene of the section with the most held-out spots."""
        return self._best.maps()

    def packed(self) -> tuple[PackedMaps, ...]:
        """Return the maps of every section, in the order of their ids."""
        collectors = self._collectors or {}
        found = (collectors[slide_id].maps() for slide_id in sorted(collectors))
        return tuple(maps.pack() for maps in found if maps is not None)


def patch_folds(section: Section, folds: Sequence[Fold]) -> NDArray[np.object_]:
    """Return the name of the fold that holds out each patch's nearest held-out spot, ``(n_patches,)``."""
    spot_fold = spot_folds(section, folds)
    # A random split never holds out half of the spots: patches belong to the nearest one that it does.
    held_out_spots = np.flatnonzero(spot_fold != "")
    _, nearest = cKDTree(section.spots.xy_um[held_out_spots]).query(section.patches.xy_um)
    return spot_fold[held_out_spots][nearest]


def spot_folds(section: Section, folds: Sequence[Fold]) -> NDArray[np.object_]:
    """Return the name of the fold that holds out each spot, ``(n_spots,)``; empty where none does."""
    found = np.full(len(section.spots), "", dtype=object)
    for fold in folds:
        found[fold.test[section.slide_id]] = fold.name
    return found
