"""An earlier model that a training goes on from: with its sums, to add to, or without, to adapt its weights."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from featurestore.documents import DocumentError, convert
from featurestore.earlier_results import short_fingerprint
from featurestore.events import OnMessage
from featurestore.slides.sample_sheet import Sample
from featurestore.storage.stored_documents import Count, Text
from histosge.errors import ModelError
from histosge.models.adaptation import why_not_adapted
from histosge.models.dense import DenseModel
from histosge.models.linear_algebra import Indices
from histosge.models.scale_ridges import ScaleRidges
from histosge.training.hub_model import model_folder, whole_model_folder
from histosge.training.kept_sums import FOLDER, KeptSums
from histosge.training.model_files import CONFIG, WEIGHTS
from histosge.training.saved_model import SavedModel, load_model

_NAMED_GENES = 5
"""Genes that a message names; the others are counted."""
SUMS_WITHOUT_DIFFERENCES = (
    "the sums are of an earlier version: the model goes on without the ridge on differences of scales; to have it, train on "
    "all sections without --from"
)


@dataclass(frozen=True)
class Start:
    """A saved model and what it was fitted from.

    Parameters
    ----------
    saved
        The model.
    kept
        Its sums.
    """

    saved: SavedModel
    kept: KeptSums


@dataclass(frozen=True)
class StartFromWeights:
    """A saved model whose weights are adapted to new sections, see `histosge.models.adaptation`.

    Parameters
    ----------
    saved
        The model.
    origin
        As the user named it, for messages.
    """

    saved: SavedModel
    origin: str

    def unseen(
        self, samples: Sequence[Sample], fingerprints: Mapping[str, Mapping[str, Any]], on_message: OnMessage
    ) -> list[Sample]:
        """Return the rows of a sheet that the model was trained without; parameters as of `new_sections`.

        Raises
        ------
        ModelError
            If there is none.
        """
        # By the file: a laboratory numbers its slides anew, and how far the weights should move cannot be chosen on
        # sections that they were fitted to.
        seen = {short_fingerprint(str(s.get("slide_fingerprint"))) for s in self.saved.card.sections}
        new = [sample for sample in samples if fingerprints[sample.slide_id]["slide"] not in seen]
        if not new:
            raise ModelError(
                f"{self.origin} was trained on all {len(samples)} sections of the sheet; name new ones, or train without "
                "--from"
            )
        if n_seen := len(samples) - len(new):
            on_message(f"{n_seen} sections are left out: {self.origin} was trained on them")
        return new

    def common_genes(
        self, measured: Collection[str], on_message: OnMessage
    ) -> tuple[tuple[str, ...], Indices]:
        """Return those of the model's genes that all new sections have, and their columns in the model.

        Parameters
        ----------
        measured
            Genes of all new sections.

        Raises
        ------
        ModelError
            If there is none.
        """
        genes, names = self.saved.card.genes, set(measured)
        columns = np.array([i for i, gene in enumerate(genes) if gene in names], np.int64)
        if not len(columns):
            raise ModelError(
                f"none of the {len(genes)} genes of {self.origin} (such as {genes[0]!r}) is among the {len(names)} genes of "
                f"the new sections (such as {min(names, default='')!r}); name genes alike, or train without --from"
            )
        if missing := [gene for gene in genes if gene not in names]:
            more = f" and {len(missing) - _NAMED_GENES} more" if len(missing) > _NAMED_GENES else ""
            on_message(
                f"{len(missing)} of {len(genes)} genes of {self.origin} are left out, since not all new sections have them: "
                f"{', '.join(missing[:_NAMED_GENES])}{more}"
            )
        return tuple(genes[i] for i in columns), columns

    @property
    def facts(self) -> dict[str, Any]:
        """Return what the card of the adapted model tells of this one."""
        card = self.saved.card
        spots = sum(int(section["spots"]) for section in card.sections)
        return {"fingerprint": self.saved.fingerprint, "sections": len(card.sections), "spots": spots}


class _SectionFacts(msgspec.Struct):
    slide_id: Text
    slide_fingerprint: Text
    spots: Count
    few_counts: Count
    off_tissue: Count
    donor: str | None


def _check_sections(saved: SavedModel, origin: str) -> None:
    # They are copied into the adapted model's card, its README and its page: a model from elsewhere may hold anything there.
    try:
        convert(list(saved.card.sections), list[_SectionFacts], f"{origin}/{CONFIG}", at="card.sections")
    except DocumentError as error:
        raise ModelError(f"{error}; adapt a model whose sections are described") from error


def open_start(folder: str | Path, *, adapt: bool = False) -> Start | StartFromWeights:
    """Open a model to go on from.

    Parameters
    ----------
    adapt
        Start from its weights also where it keeps sums.

    Raises
    ------
    ModelError
        If it is no model, has neither sums nor weights that can be adapted, or is on the hub and the hub refuses.
    """
    files = (CONFIG, WEIGHTS)
    local = model_folder(folder, files) if adapt else whole_model_folder(folder, files, FOLDER)
    saved = load_model(local)
    kept = None if adapt else KeptSums.open(local)
    if kept is None:
        if why_not := why_not_adapted(saved.model):
            sums = "" if adapt else "keeps no sums (stats/) to add sections to, and "
            raise ModelError(
                f"{folder} {sums}cannot be adapted: {why_not}; train on all sections without --from"
            )
        _check_sections(saved, str(folder))
        return StartFromWeights(saved, str(folder))
    dim, n_outputs = saved.card.encoder["dim"], kept.shape[1]
    if kept.preset != saved.card.preset or kept.shape[0] != dim:
        raise ModelError(
            f"{kept.folder} is of {kept.preset!r} with {kept.shape[0]} numbers and {n_outputs} outputs, the model is "
            f"{saved.card.preset!r} with {dim} numbers; train again"
        )
    _check_weights(saved, kept)
    return Start(saved, kept)


def _check_weights(saved: SavedModel, kept: KeptSums) -> None:
    """Refuse sums that are of another number of ridges than the model has weights of."""
    if not isinstance(saved.model, DenseModel) or not isinstance(saved.model.linear, ScaleRidges):
        return
    n_ridges = len(kept.sigmas_um) + (kept.differences is not None)
    n_weights = len(saved.model.linear.weights)
    if n_weights != n_ridges:
        raise ModelError(
            f"{kept.folder} has sums of {n_ridges} ridges, and the model weights of {n_weights}; train again"
        )


def new_sections(
    start: Start, samples: Sequence[Sample], fingerprints: Mapping[str, Mapping[str, Any]]
) -> list[Sample]:
    """Return the rows of a sheet whose sections are not in the model yet.

    Parameters
    ----------
    fingerprints
        Of each row's slide and expression, by slide id; see `histosge.training.made_with.describe_sections`.

    Raises
    ------
    ModelError
        If a section that is in the model has changed, or none is new.
    """
    earlier, new = {section.slide_id: section for section in start.kept.sections}, []
    for sample in samples:
        kept, now = earlier.get(sample.slide_id), fingerprints[sample.slide_id]
        if kept is None:
            new.append(sample)
            continue
        for what, before in (("slide", kept.slide), ("expression", kept.expression)):
            if now[what] != before:
                raise ModelError(
                    f"the {what} of section {sample.slide_id!r} has changed since the model was trained ({before} is now "
                    f"{now[what]}); its sums cannot be taken out: train on all sections without --from"
                )
    if not new:
        raise ModelError(
            f"all {len(samples)} sections of the sheet are in the model already; name new ones, or train without --from"
        )
    return new
