"""How an encoder is found by its key: ours, the records, timm's, and those of other packages.

Nothing here imports torch before an encoder is loaded: listing the encoders has to be quick.
"""

from collections.abc import Iterator
from typing import Any

from featurestore.collector import collector_paused
from featurestore.encoders.protocol import Encoder, EncoderExtension, EncoderOptions
from featurestore.encoders.records import TIMM_PREFIX, find, records
from featurestore.encoders.tokens import group_tokens
from featurestore.errors import EncoderError, FeatureStoreError
from featurestore.extensions import Registry
from featurestore.threads import keep_to_own_cores, spin_briefly

DEFAULT_ENCODER = "morphology"


def _load_published(key: str, options: EncoderOptions) -> Encoder:
    from featurestore.encoders.vision import load_record

    return load_record(records()[key], options)


def _published() -> Iterator[EncoderExtension]:
    """Yield the records of ``records.toml`` as extensions."""
    for key, record in records().items():
        yield EncoderExtension(key, record.title, record.dim, _load_published)


def _from_callable(name: str, value: Any) -> EncoderExtension | None:
    """Return an extension for an entry point whose value is a plain loader, as the first packages offered them."""
    if not callable(value):
        return None
    where = getattr(value, "__module__", type(value).__name__)
    # Only loading would tell its width, and loading may download weights.
    return EncoderExtension(name, f"an encoder of {where}", None, value)


ENCODERS: Registry[EncoderExtension] = Registry(
    "encoders",
    "featurestore.encoders.handcrafted",
    EncoderExtension,
    EncoderError,
    more=_published,
    adapt=_from_callable,
)


def load_encoder(key: str, options: EncoderOptions | None = None) -> Encoder:
    """Load an encoder by its key.

    Raises
    ------
    EncoderError
        If the key is unknown (the nearest names are given), the weights cannot be had or they do not fit.
    """
    options = options or EncoderOptions()
    spin_briefly()
    keep_to_own_cores()  # here, since every encoder is loaded before it computes, in whatever process
    with collector_paused():
        return _load(canonical_key(key), options)


def _load(key: str, options: EncoderOptions) -> Encoder:
    # By their prefix, not as records: timm has more than a thousand models, and listing them imports torch.
    if key.startswith(TIMM_PREFIX):
        from featurestore.encoders.vision import load_timm

        return load_timm(key, options)
    if key not in ENCODERS.names():
        raise EncoderError(f"unknown encoder {key!r}: {ENCODERS.suggest(key)}")
    extension = ENCODERS.get(key)
    encoder = extension.load(key, options) if key in ENCODERS.own else _load_foreign(extension, options)
    return encoder if options.tokens is None else group_tokens(encoder, options.tokens)


def _load_foreign(extension: EncoderExtension, options: EncoderOptions) -> Encoder:
    """Load an encoder of another package; what goes wrong in it is one line that names the package."""
    key = extension.name
    where = ENCODERS.offered[key].value
    try:
        encoder = extension.load(key, options)
    except FeatureStoreError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())
        raise EncoderError(
            f"encoder {key!r} of {where} cannot be loaded: {type(error).__name__}: {reason}"
        ) from error
    # Stores and models record the identity's key and load by it later, so it has to be the registered one.
    if encoder.identity.key != key:
        raise EncoderError(
            f"encoder {key!r} of {where} has the identity of {encoder.identity.key!r}; its author has to correct that"
        )
    return encoder


def canonical_key(key: str) -> str:
    """Return the key that a store records: ``uni@cls`` and ``uni`` are one encoder."""
    record = find(key)
    return key if record is None else record.key


def takes_weights(key: str) -> bool:
    """Whether ``--weights`` can be meant for an encoder; an unknown key might take some."""
    key = canonical_key(key)
    return ENCODERS.get(key).takes_weights if key in ENCODERS.names() else True
