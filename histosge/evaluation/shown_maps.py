"""Which held-out maps a report shows, collected fold by fold without keeping whole predictions.

The section with the most held-out spots is shown with three genes, further ones with one gene each, for one preset and
one seed. Each patch is predicted by the fold that holds out the nearest held-out spot. Genes are picked by
held-out score; nothing else about them is looked at.

It fits nothing and draws nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Self

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from histosge.data.sections import Section
from histosge.evaluation.results import GeneMap
from histosge.heldout.splits import Fold

MOST_SECTIONS = 12
"""Sections with maps in a report: at about 0.15 MB each the page stays small enough to be sent."""
KEPT_GENES = 20
"""Of a further section, until its own best gene is known: a whole prediction of each would not fit into memory."""
OTHER_SECTION = "other section"
"""Role of the gene that is shown of a further section."""


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
        log1p(CP10k) of all its patches, ``(n_patches, n_genes)``.
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
    most_genes
        Of a prediction that are kept, the fold's best ones; None: all.
    """

    section: Section
    spot_fold: NDArray[np.object_]
    patch_fold: NDArray[np.object_]
    predictions: dict[str, FoldPrediction] = field(default_factory=dict)
    most_genes: int | None = None

    @classmethod
    def for_sections(cls, sections: Sequence[Section], folds: Sequence[Fold]) -> list[Self]:
        """Take the section with the most held-out spots first, the first of several, and then others in their order.

        Sections beyond `MOST_SECTIONS`, and those of which nothing is held out, are left out.
        """

        def held_out(section: Section) -> int:
            return sum(int(fold.test[section.slide_id].sum()) for fold in folds)

        first = max(sections, key=held_out)
        others = [section for section in sections if section is not first and held_out(section)]
        shown = [first, *others[: MOST_SECTIONS - 1]]
        return [
            cls.for_section(section, folds, None if section is first else KEPT_GENES) for section in shown
        ]

    @classmethod
    def for_section(cls, section: Section, folds: Sequence[Fold], most_genes: int | None = None) -> Self:
        """Find out which fold predicts each patch of a section."""
        spot_fold = np.full(len(section.spots), "", dtype=object)
        for fold in folds:
            spot_fold[fold.test[section.slide_id]] = fold.name
        # A random split never holds out half of the spots: patches belong to the nearest one that it does.
        held_out_spots = np.flatnonzero(spot_fold != "")
        _, nearest = cKDTree(section.spots.xy_um[held_out_spots]).query(section.patches.xy_um)
        return cls(section, spot_fold, spot_fold[held_out_spots][nearest], most_genes=most_genes)

    def add(self, fold: Fold, prediction: FoldPrediction) -> None:
        """Add a fold's prediction of the shown section; patches that are another fold's to predict are dropped."""
        # Cut down at once: all folds' whole maps would be slides x genes x folds in memory.
        own = prediction.predicted[self.patch_fold == fold.name]
        prediction = replace(prediction, predicted=own)
        if self.most_genes is not None:
            # Of all folds the same genes: those that the first one predicts best.
            first = next(iter(self.predictions.values()), prediction)
            best = np.argsort(-first.pearson, kind="stable")[: self.most_genes]
            names = {first.genes[i] for i in best}
            kept = [i for i, gene in enumerate(prediction.genes) if gene in names]
            prediction = FoldPrediction(
                tuple(prediction.genes[i] for i in kept),
                prediction.pearson[kept],
                prediction.target[:, kept],
                prediction.predicted[:, kept],
            )
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

    def other(self, prefer: str) -> GeneMap | None:
        """Return the map of one gene of a further section: of `prefer`, if it is among its best, else of its best."""
        ranked = self._ranked()
        if not ranked:
            return None
        return self._map(prefer if prefer in ranked else ranked[0], OTHER_SECTION)

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


def shown_maps(sections: Sequence[HeldOutMaps]) -> tuple[GeneMap, ...]:
    """Return the maps of the first section, and then one of each other."""
    first, *others = sections
    maps = first.maps()
    if not maps:
        return ()
    further = (section.other(prefer=maps[0].gene) for section in others)
    return (*maps, *(found for found in further if found is not None))
