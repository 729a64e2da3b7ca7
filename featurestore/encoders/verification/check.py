"""Compare records with their published networks: a row for each.

Two comparisons. At full size, on the meta device, names, shapes and the number of parameters of the published file
with those that the record's network takes. At the published widths with few blocks, the vectors: a stand-in file
goes through the product as a user's would, from ``--weights`` to the vector; the other implementation gets the same
patches, prepared by PIL.
"""

import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from operator import attrgetter
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from featurestore.encoders.architecture import build
from featurestore.encoders.golden import golden_image
from featurestore.encoders.protocol import EncoderOptions
from featurestore.encoders.records import EncoderRecord, Preprocessing
from featurestore.encoders.uninitialised import without_initialisation
from featurestore.encoders.verification.oracles import StandIn, make_stand_in
from featurestore.encoders.verification.stand_in_files import BLOCKS
from featurestore.encoders.vision import load_record
from featurestore.encoders.weights import fit_state
from featurestore.errors import EncoderError

MIN_COSINE = 0.9999
"""Least cosine that counts as equal: resampled bytes differ from PIL's by up to two grey levels."""
PATCH_PX = 300
"""Side of the patches: larger than what any record resizes to but CONCH, so that resampling takes part."""
PATCHES = 6


@dataclass(frozen=True)
class RecordCheck:
    """What was found of one record.

    Parameters
    ----------
    key
        Of the record.
    oracle
        What it was compared with; ``facts only`` where no other implementation is at hand.
    tensors, parameters
        In the published file, as the oracle has them; None without one.
    misfit
        The first difference of names, shapes or counts; empty if there is none.
    cosine
        The smallest of the patches, also after the mean over patches is subtracted; None without an oracle.
    """

    key: str
    oracle: str
    tensors: int | None = None
    parameters: int | None = None
    misfit: str = ""
    cosine: float | None = None

    @property
    def agrees(self) -> bool:
        """Whether nothing differs; a record without an oracle agrees with nothing and contradicts nothing."""
        return not self.misfit and (self.cosine is None or self.cosine >= MIN_COSINE)


def check_records(records: Iterable[EncoderRecord]) -> Iterator[RecordCheck]:
    """Yield a row for each record, in their order.

    Raises
    ------
    EncoderError
        If transformers is needed and not installed.
    """
    # Variants of one name share a published file, and stand next to each other.
    for _, variants in groupby(records, key=attrgetter("name")):
        same = list(variants)
        if not same[0].oracle:
            yield from (RecordCheck(record.key, "facts only") for record in same)
            continue
        # One stand-in at a time: that of the widest network has 0.25 GB.
        with tempfile.TemporaryDirectory() as folder:
            stand_in = make_stand_in(same[0], Path(folder))
            yield from (compare(record, stand_in) for record in same)


def compare(record: EncoderRecord, stand_in: StandIn) -> RecordCheck:
    """Compare a record with a stand-in of its published network."""
    misfit = _compare_shapes(record, stand_in)
    row = RecordCheck(record.key, record.oracle, len(stand_in.shapes), stand_in.parameters, misfit)
    try:
        return row if misfit else replace(row, cosine=_cosine(record, stand_in))
    except EncoderError as error:
        return replace(row, misfit=str(error))


def _compare_shapes(record: EncoderRecord, stand_in: StandIn) -> str:
    """Return the first difference between the published network and the record's, both whole."""
    # Without drawing first weights: on the meta device torch (2.13) does that in Python.
    with torch.device("meta"), without_initialisation():
        model = build(record)
    with torch.device("meta"):
        state = {name: torch.empty(shape) for name, shape in stand_in.shapes.items()}
        _, misfit = fit_state(model, state, record.state, record.positions)
    if misfit is not None:
        return f"{misfit.name}: {misfit.here} by the record, {misfit.there} published"
    config = record.config
    published = None if config is None or config.parameters is None else round(config.parameters * 1e6)
    if published not in (None, stand_in.parameters):
        return f"parameters: {published} published, {stand_in.parameters} by {record.oracle}"
    return ""


def _cosine(record: EncoderRecord, stand_in: StandIn) -> float:
    patches = _patches()
    short = record if record.oracle == "SwinModel" else _shortened(record)
    encoder = load_record(short, EncoderOptions(weights=str(stand_in.path), device="cpu", precision="fp32"))
    found = encoder.encode(patches).astype(np.float64)
    with torch.inference_mode():
        tokens = stand_in.tokens(_prepared(patches, stand_in.preprocessing))
    expected = _pooled(tokens, record).double().numpy()
    # What is alike in all patches would hide a difference in what the patches make of it.
    pairs = ((found, expected), (found - found.mean(0), expected - expected.mean(0)))
    return min(_smallest_cosine(one, other) for one, other in pairs)


def _shortened(record: EncoderRecord) -> EncoderRecord:
    return replace(record, arguments={**record.arguments, "depth": BLOCKS}, parameters=None)


def _patches() -> NDArray[np.uint8]:
    whole = golden_image(PATCH_PX + 64 * PATCHES)
    return np.stack([whole[64 * i : 64 * i + PATCH_PX, 48 * i : 48 * i + PATCH_PX] for i in range(PATCHES)])


def _prepared(patches: NDArray[np.uint8], how: Preprocessing) -> Tensor:
    """Prepare patches by PIL and numpy."""
    kind = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}[how.interpolation]
    edge = round((how.resize_px - how.input_px) / 2)
    box = (edge, edge, edge + how.input_px, edge + how.input_px)
    resized = [
        np.asarray(Image.fromarray(patch).resize((how.resize_px, how.resize_px), kind).crop(box))
        for patch in patches
    ]
    scaled = (np.stack(resized) / 255 - np.array(how.mean)) / np.array(how.std)
    return torch.from_numpy(scaled).permute(0, 3, 1, 2).float()


def _pooled(tokens: Tensor, record: EncoderRecord) -> Tensor:
    if record.pooling != "cls+mean" or record.config is None:
        return tokens[:, 0]
    return torch.cat([tokens[:, 0], tokens[:, 1 + record.config.registers :].mean(1)], dim=-1)


def _smallest_cosine(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    lengths = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
    return float(((one * other).sum(1) / lengths).min())
