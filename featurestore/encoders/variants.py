"""Which records a weights file fits, or is the published file of: for messages about a file of another variant."""

from pathlib import Path

import torch

from featurestore.encoders.architecture import build
from featurestore.encoders.records import EncoderRecord, records
from featurestore.encoders.state_layouts import State
from featurestore.encoders.weights import fit_state
from featurestore.errors import EncoderError

MOST_NAMED = 3
"""Records in one message: several encoders have one architecture, and a line has to stay readable."""


def fitting_records(raw: State) -> list[EncoderRecord]:
    """Return the records whose network takes a file's tensors, all of them; one of each name.

    Networks and tensors are on the meta device: only names and shapes are compared.
    """
    shapes = {name: torch.empty_like(tensor, device="meta") for name, tensor in raw.items()}
    # Building the largest network takes 3 s even without memory, so its width is compared first.
    widths = {size for tensor in shapes.values() for size in tensor.shape}
    return [
        record
        for record in records().values()
        if record.package == "timm"
        and record.is_default
        and _width(record) in widths
        and _fits(record, shapes)
    ]


def published_as(digest: str) -> list[EncoderRecord]:
    """Return the records whose published file has this sha256; one of each name."""
    return [
        record
        for record in records().values()
        if record.is_default
        and record.published is not None
        and record.published.sha256 is not None
        and digest.startswith(record.published.sha256)
    ]


def refuse_file_of_another(record: EncoderRecord, path: Path, digest: str) -> None:
    """Refuse the published file of another encoder, which fits since the two networks have the same tensors.

    Raises
    ------
    EncoderError
        If it is one; its vectors would stand in stores under a wrong name.
    """
    owners = published_as(digest)
    if owners and record.name not in {owner.name for owner in owners}:
        raise EncoderError(
            f"{path.name} is the published file of {owners[0].key}, whose tensors have the same names and shapes as "
            f"those of {record.key}; use --encoder {owners[0].key}"
        )


def other_variant(raw: State, digest: str = "") -> str:
    """Return the end of a message: the records that a file fits, if there are any.

    Where `digest`, its sha256, is that of a published file, only the records of that file are named.
    """
    fitting = fitting_records(raw)
    known = {record.name for record in published_as(digest)} if digest else set()
    keys = [record.key for record in fitting if record.name in known] or [record.key for record in fitting]
    if not keys:
        return ""
    some = ", ".join(keys[:MOST_NAMED])
    more = f" or {len(keys) - MOST_NAMED} more" if len(keys) > MOST_NAMED else ""
    return f"; the file fits --encoder {some}{more}"


def _width(record: EncoderRecord) -> int:
    # A vector of the class token and a mean is twice as wide as the network.
    return record.dim // 2 if record.pooling == "cls+mean" else record.dim


def _fits(record: EncoderRecord, shapes: State) -> bool:
    with torch.device("meta"):
        model = build(record)
        _, misfit = fit_state(model, shapes, record.state, record.positions)
    return misfit is None
