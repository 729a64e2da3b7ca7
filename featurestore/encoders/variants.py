"""Which records a weights file fits: what a message about a file of another variant ends with."""

import torch

from featurestore.encoders.architecture import build
from featurestore.encoders.records import EncoderRecord, records
from featurestore.encoders.state_layouts import State
from featurestore.encoders.weights import fit_state

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


def other_variant(raw: State) -> str:
    """Return the end of a message: the records that a file fits, if there are any."""
    keys = [record.key for record in fitting_records(raw)]
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
