"""The public sections, embedded anew: for what made tissue cannot show."""

import os
from pathlib import Path

from featurestore.embedding.embed import EmbedSettings, embed
from featurestore.grid import GridSpec
from histosge.data.section_loading import LoadedSection, Selection, load_sections

SPEC = GridSpec(mpp=0.7, patch_px=320, stride_px=80)
"""Patches of 224 µm every 56 µm."""


def public_sheet() -> Path | None:
    """Return the sample sheet of the sections in ``HISTOSGE_DATA``, or None where they are absent."""
    sheet = (
        Path(os.environ.get("HISTOSGE_DATA", Path(__file__).parents[2] / "shared" / "data")) / "cohort.csv"
    )
    return sheet if sheet.is_file() else None


def embed_public(sheet: Path, folder: Path, spec: GridSpec = SPEC) -> list[LoadedSection]:
    """Embed the sections with `morphology` in a store of their own, and load them."""
    embed(str(sheet), f"{folder}/store", EmbedSettings(encoders=("morphology",), spec=spec))
    return load_sections(str(sheet), f"{folder}/store", Selection())
