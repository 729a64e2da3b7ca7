"""How an encoder is found by its key: ours, the records, timm's, and those of other packages."""

from collections.abc import Callable
from difflib import get_close_matches
from importlib.metadata import EntryPoint, entry_points

from featurestore.encoders.protocol import Encoder, EncoderOptions
from featurestore.encoders.records import TIMM_PREFIX, find, records
from featurestore.errors import EncoderError, FeatureStoreError

DEFAULT_ENCODER = "morphology"


def _load_morphology(key: str, options: EncoderOptions) -> Encoder:
    from featurestore.encoders.handcrafted.morphology import MorphologyEncoder

    return MorphologyEncoder(options)


def _load_colour(key: str, options: EncoderOptions) -> Encoder:
    from featurestore.encoders.handcrafted.colour import ColourEncoder

    return ColourEncoder(options)


HANDCRAFTED: dict[str, tuple[Callable[[str, EncoderOptions], Encoder], int, str]] = {
    "morphology": (
        _load_morphology,
        164,
        "handcrafted: stain statistics, oriented filters, nuclei; no weights, no network",
    ),
    "colour": (_load_colour, 6, "mean and standard deviation of R, G, B: the floor that texture has to beat"),
}
"""Key -> (loader, width, one line about it)."""


ENTRY_POINTS = "histosge.encoders"
"""Group under which other packages offer encoders: key = a callable ``(key, options) -> Encoder``."""


def third_party() -> dict[str, EntryPoint]:
    """Return the encoders that installed packages offer, by key; nothing is imported."""
    return {point.name: point for point in entry_points(group=ENTRY_POINTS)}


def load_encoder(key: str, options: EncoderOptions | None = None) -> Encoder:
    """Load an encoder by its key.

    Raises
    ------
    EncoderError
        If the key is unknown (the nearest names are given), the weights cannot be had or they do not fit.
    """
    options = options or EncoderOptions()
    if key in HANDCRAFTED:
        return HANDCRAFTED[key][0](key, options)
    record = find(key)
    if record is not None:
        from featurestore.encoders.vision import load_record

        return load_record(record, options)
    if key.startswith(TIMM_PREFIX):
        from featurestore.encoders.vision import load_timm

        return load_timm(key, options)
    others = third_party()
    if key in others:
        return _load_third_party(key, others[key], options)
    known = [*HANDCRAFTED, *records(), *others]
    near = get_close_matches(key.lower(), known, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}?" if near else "see: histosge encoders"
    raise EncoderError(f"unknown encoder {key!r}: {hint}")


def _load_third_party(key: str, point: EntryPoint, options: EncoderOptions) -> Encoder:
    try:
        encoder: Encoder = point.load()(key, options)
    except FeatureStoreError:
        raise
    except Exception as error:
        raise EncoderError(
            f"encoder {key!r} of {point.value} cannot be loaded: {type(error).__name__}: {error}"
        ) from error
    if encoder.identity.key != key:
        raise EncoderError(
            f"encoder {key!r} of {point.value} calls itself {encoder.identity.key!r}; its author has to mend that"
        )
    return encoder


def canonical_key(key: str) -> str:
    """Return the key that a store records: ``uni@cls`` and ``uni`` are one encoder."""
    record = find(key)
    return key if record is None else record.key
