"""The embedded default encoder: stains, texture and nuclei, by arithmetic alone. See `morphology_features`."""

from featurestore.encoders.protocol import Encoder, EncoderExtension, EncoderOptions


def feature_names() -> tuple[str, ...]:
    """Return the name of each number of the vector, in order."""
    from featurestore.encoders.handcrafted.morphology_features import morphology_encoder

    return morphology_encoder.feature_names()


def _load(key: str, options: EncoderOptions) -> Encoder:
    from featurestore.encoders.handcrafted.morphology_features.morphology_encoder import MorphologyEncoder

    return MorphologyEncoder(options)


RECORD = EncoderExtension(
    "morphology",
    "handcrafted: stain statistics, oriented filters, nuclei; no weights, no network",
    164,
    _load,
    takes_weights=False,
)
