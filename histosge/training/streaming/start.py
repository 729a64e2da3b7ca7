"""An earlier model with its sums, which a training goes on from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from featurestore.slides.sample_sheet import Sample
from histosge.errors import ModelError
from histosge.training.hub_model import whole_model_folder
from histosge.training.kept_sums import FOLDER, KeptSums
from histosge.training.saved_model import CONFIG, WEIGHTS, SavedModel, load_model


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


def open_start(folder: str | Path) -> Start:
    """Open a model to go on from.

    Raises
    ------
    ModelError
        If it is no model, keeps no sums, or is on the hub and the hub refuses.
    """
    local = whole_model_folder(folder, (CONFIG, WEIGHTS), FOLDER)
    saved, kept = load_model(local), KeptSums.open(local)
    if kept is None:
        raise ModelError(
            f"{folder} keeps no sums (stats/) to add sections to: dense and ridge with one encoder and squared errors keep "
            "them unless --no-stats is given; train on all sections without --from"
        )
    dim, n_outputs = saved.card.encoder["dim"], kept.shape[1]
    if kept.preset != saved.card.preset or kept.shape[0] != dim:
        raise ModelError(
            f"{kept.folder} is of {kept.preset!r} with {kept.shape[0]} numbers and {n_outputs} outputs, the model is "
            f"{saved.card.preset!r} with {dim} numbers; train again"
        )
    return Start(saved, kept)


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
