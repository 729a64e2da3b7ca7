"""What a training or an evaluation is made with: its settings, and fingerprints of what goes in.

Two runs with equal records give the same result up to rounding: how many threads add numbers up, and in which order the
rows of the sheet stand, is no part of a record. Nothing large is read for it: expression is known by its files, embeddings
by the identity of encoder, grid and slide.
"""

from dataclasses import fields
from pathlib import Path
from typing import Any

from featurestore.credentials import strip_credentials
from featurestore.earlier_results import content_fingerprint, short_fingerprint
from featurestore.encoders.protocol import EncoderIdentity
from featurestore.slides.sample_sheet import Sample, read_samples
from featurestore.storage.store import Store
from histosge.data.expression.section_choice import split_section
from histosge.data.gene_choice import SEURAT, GeneChoice, GeneSource
from histosge.data.section_loading import Selection
from histosge.data.spot_loading import require_expression
from histosge.models.estimators import ModelSource, find_estimator

RECORD_FORMAT = 1
"""Raised when a change of the software makes equal records give other results: then nothing counts as the same."""
# Slides are known by their fingerprint in the store. A row's own mpp is in the store, too: it went into the grid.
_NO_INPUT = ("slide_id", "slide", "expression", "mpp", "fallback_mpp", "mask")


def describe_settings(settings: Any, **replaced: Any) -> dict[str, Any]:
    """Return the fields of a dataclass of settings as JSON-ready values, without its `selection`.

    Parameters
    ----------
    replaced
        Values that stand in place of the fields' own.
    """
    # All fields, not a list of them: one that is added later must not be overlooked.
    found = {f.name: getattr(settings, f.name) for f in fields(settings) if f.name != "selection"}
    return {"format": RECORD_FORMAT} | found | replaced


def describe_genes(genes: GeneSource) -> str | int | list[str]:
    """Return a choice of genes by what it chooses: of a file, the names in it."""
    choice = GeneChoice.parse(genes)
    if choice.is_given:
        return list(choice.named)
    number: str | int = "all" if choice.n_variable is None else choice.n_variable
    if choice.by_seurat:
        number = f"{SEURAT}:{number}"
    return f"{number}+{','.join(choice.named)}" if choice.named else number


def describe_preset(preset: ModelSource) -> str:
    """Return a preset's name, of an object with its values as its ``repr`` shows them."""
    name = find_estimator(preset).name
    if isinstance(preset, str | type):
        return name
    # An object without a repr of its own is told apart from every other one: its address differs from run to run.
    return f"{name} {preset!r}"


def describe_sections(samples: str | Path, store: str | Path, selection: Selection) -> dict[str, Any]:
    """Return encoder, grid and every section of a sample sheet, by their fingerprints.

    Raises
    ------
    ExpressionError, StoreError, SampleSheetError
        If a row names no expression, or its embedding is not in the store.
    """
    opened = Store.open(str(store))
    encoders, grids, sections = set(), set(), {}
    # By id: the order of the rows changes nothing.
    for sample in sorted(read_samples(str(samples)), key=lambda sample: sample.slide_id):
        expression = require_expression(sample)
        slide = selection.open(opened, sample.slide_id)
        encoders.add(name_encoder(slide.identity))
        grids.add(slide.stored.grid.spec.key)
        sections[sample.slide_id] = {
            "slide": short_fingerprint(slide.fingerprint),
            "expression": _expression_fingerprint(expression),
            **_row(sample),
        }
    # Several are refused when they are loaded, with both named.
    return {"encoder": ", ".join(sorted(encoders)), "grid": ", ".join(sorted(grids)), "sections": sections}


def name_encoder(identity: EncoderIdentity) -> str:
    """Return an encoder's key and fingerprint for a record: one key may stand for other weights."""
    return f"{identity.key} {short_fingerprint(identity.fingerprint)}"


def _row(sample: Sample) -> dict[str, Any]:
    """Return what else a row of the sheet says, as text: donor, region, whatever columns there are."""
    values = {f.name: getattr(sample, f.name) for f in fields(sample) if f.name not in _NO_INPUT}
    return {name: str(value) for name, value in values.items() if value is not None}


def _expression_fingerprint(expression: str) -> str:
    # What lies behind a URL is known by its address alone: it may be large, and far away.
    if "://" in expression:
        return strip_credentials(expression)
    file, section = split_section(expression)
    return content_fingerprint(file) + (f" {section}" if section else "")
