"""How well domains found in held-out predictions agree with a pathologist's annotation of the same spots.

By the one rule of `spatial_domains`, which never sees a label: from what was measured, from what each preset predicts,
from the embeddings, and from the controls. The number of domains is that of the annotation's classes in the section.
All values are of held-out spots: each spot is predicted by the fold that holds it out.

Terms
    label   class of a spot, as text; empty where the annotator gave none: such spots are dropped before scoring
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Self

import numpy as np
import polars as pl
from numpy.typing import NDArray

from featurestore.slides.sample_sheet import read_samples
from histosge.data.expression.annotation import read_annotation
from histosge.data.expression.loaded_expression import SlideFrame
from histosge.data.section_loading import LoadedSection
from histosge.data.sections import Section
from histosge.data.spot_loading import require_expression
from histosge.data.spot_overlap import spot_embeddings
from histosge.errors import ExpressionError
from histosge.evaluation.paired_bootstrap import HeldOutSpots
from histosge.evaluation.spatial_domains import COMPONENTS, SEEDS, find_domains, score_domains
from histosge.models.linear_algebra import Standardiser

MEASURED, EMBEDDINGS = "measured", "embeddings"
"""Rows beside the presets."""
UNLABELLED = ""
MOST_CLASSES = 50
"""An annotation with more is a measurement or a list of names: 20 domains are the most that annotators of the public
sections tell apart."""
DOMAIN_SCHEMA = {
    "preset": pl.String,
    "split": pl.String,
    "section": pl.String,
    "seed": pl.Int64,
    "kmeans_seed": pl.Int64,
    "ari": pl.Float64,
    "nmi": pl.Float64,
    "n_domains": pl.Int64,
    "n_labelled": pl.Int64,
    "n_unlabelled": pl.Int64,
}

Labels = NDArray[np.str_]


@dataclass(frozen=True)
class Annotation:
    """Labels of the spots of some sections.

    Parameters
    ----------
    column
        Of the expression files.
    labels
        Slide id -> label of each of the section's spots, ``(n_spots,)``; only sections with two classes or more.
    notes
        One sentence for each section without.
    """

    column: str
    labels: Mapping[str, Labels]
    notes: tuple[str, ...] = ()

    @classmethod
    def read(cls, samples: str, loaded: Sequence[LoadedSection], column: str) -> Self:
        """Read a column of every section's expression file, for the spots that are evaluated.

        Raises
        ------
        ExpressionError
            If a file has no such column, its values are no classes, or no section has two classes.
        """
        by_id = {sample.slide_id: sample for sample in read_samples(samples)}
        labels: dict[str, Labels] = {}
        notes = []
        for item in loaded:
            sample, section = by_id[item.section.slide_id], item.section
            # A column of text: neither scale nor size of the slide matters.
            frame = SlideFrame(sample.slide_id, sample.donor, 1.0)
            found = read_annotation(require_expression(sample), frame, column)
            own = np.array([found.get(name, UNLABELLED) for name in section.spots.barcodes.tolist()], np.str_)
            classes = sorted(set(own.tolist()) - {UNLABELLED})
            if len(classes) > MOST_CLASSES:
                raise ExpressionError(
                    f"annotation {column!r} has {len(classes)} values in section {sample.slide_id!r} (at most "
                    f"{MOST_CLASSES} are classes): name a column of classes"
                )
            if len(classes) >= 2:
                labels[sample.slide_id] = own
                continue
            n = int((own != UNLABELLED).sum())
            what = f"one class ({classes[0]!r})" if classes else "no label"
            notes.append(f"{sample.slide_id}: {what} of {column!r} on {n} of {len(own)} spots")
        if not labels:
            raise ExpressionError(
                f"annotation {column!r} tells no two classes apart in any section ({'; '.join(notes[:3])}): domains "
                "cannot be compared with it; name another column"
            )
        return cls(column, labels, tuple(f"{note}; left out of the domains." for note in notes))


@dataclass
class HeldOutDomains:
    """Collects held-out predictions until a section is complete, and scores its domains.

    Parameters
    ----------
    sections
        All of the evaluation.
    annotation
        Of some of them.
    """

    sections: Sequence[Section]
    annotation: Annotation
    split: str
    _parts: dict[tuple[str, int, str], list["_Part"]] = field(default_factory=dict)
    _rows: list[tuple[object, ...]] = field(default_factory=list)

    def add(self, preset: str, seed: int, held_out: HeldOutSpots, predicted: NDArray[np.float64]) -> None:
        """Add a fold's held-out spots, predicted ``(n_spots, n_genes)``."""
        for slide_id in np.unique(held_out.section).tolist():
            if slide_id not in self.annotation.labels:
                continue
            here = held_out.section == slide_id
            part = _Part(held_out.genes, held_out.place[here], predicted[here].astype(np.float32))
            parts = self._parts.setdefault((preset, seed, slide_id), [])
            parts.append(part)
            # Scored as soon as it is whole: a cohort's predictions of all presets would not fit in memory.
            if sum(len(one.place) for one in parts) == len(self.annotation.labels[slide_id]):
                self._score(preset, seed, slide_id)

    def add_measured(self, seed: int, held_out: HeldOutSpots) -> None:
        """Add what the held-out spots measured, and their embeddings."""
        self.add(MEASURED, seed, held_out, held_out.truth)
        # As wide as the embedding: in place of genes there are its numbers, the same in every fold.
        for section in self.sections:
            here = held_out.section == section.slide_id
            if not here.any() or section.slide_id not in self.annotation.labels:
                continue
            place = held_out.place[here]
            values = spot_embeddings(section.overlap[place], section.patches)
            names = tuple(map(str, range(values.shape[1])))
            spots = HeldOutSpots(
                held_out.fold, seed, names, values, held_out.depth[here], held_out.section[here], place
            )
            self.add(EMBEDDINGS, seed, spots, values)

    def _score(self, preset: str, seed: int, slide_id: str) -> None:
        parts = self._parts.pop((preset, seed, slide_id))
        # Genes are chosen fold by fold: those that every fold has are compared.
        genes = [name for name in parts[0].genes if all(name in part.columns for part in parts[1:])]
        place = np.concatenate([part.place for part in parts])
        labels = self.annotation.labels[slide_id][place]
        n_domains = len(set(labels.tolist()) - {UNLABELLED})
        if not genes or n_domains < 2:
            return
        values = np.concatenate([part.values[:, [part.columns[name] for name in genes]] for part in parts])
        if preset == EMBEDDINGS:
            # Standardised: the numbers of an embedding have no common unit.
            values = Standardiser.fit(values.astype(np.float64)).apply(values)
        found = score_domains(find_domains(values, n_domains), labels, UNLABELLED)
        key, sizes = (preset, self.split, slide_id, seed), (n_domains, found.n_labelled, found.n_unlabelled)
        self._rows += [
            (*key, number, float(ari), float(nmi), *sizes)
            for number, (ari, nmi) in enumerate(zip(found.ari, found.nmi, strict=True))
        ]

    def table(self) -> pl.DataFrame:
        """Return the scores of every section; a split that holds out a part of the spots is scored on that part."""
        for preset, seed, slide_id in list(self._parts):
            self._score(preset, seed, slide_id)
        return pl.DataFrame(self._rows, schema=DOMAIN_SCHEMA, orient="row")


@dataclass(frozen=True)
class _Part:
    """Predictions of some spots of a section: genes, numbers of the spots, ``(n_spots, n_genes)``."""

    genes: tuple[str, ...]
    place: NDArray[np.int64]
    values: NDArray[np.float32]

    @property
    def columns(self) -> dict[str, int]:
        return {name: i for i, name in enumerate(self.genes)}


def domain_rows(domains: pl.DataFrame) -> list[tuple[str, str, str, int, str, float]]:
    """Return rows of scores.csv: mean ARI and NMI of each section over the seeds of k-means, the section as fold."""
    means = domains.group_by("preset", "split", "section", "seed", maintain_order=True).agg(
        pl.col("ari", "nmi").mean()
    )
    return [
        (row["preset"], row["split"], row["section"], row["seed"], metric, row[metric])
        for row in means.iter_rows(named=True)
        for metric in ("ari", "nmi")
    ]


def domain_notes(annotation: Annotation | None) -> tuple[str, ...]:
    """Return in sentences how domains were found, and which sections were left out; nothing without an annotation."""
    if annotation is None:
        return ()
    rule = (
        f"Domains by k-means on {COMPONENTS} principal components, {SEEDS} seeds, none selected; as many domains as "
        f"{annotation.column!r} has classes in the section; spots without a label dropped."
    )
    return (rule, *annotation.notes)
