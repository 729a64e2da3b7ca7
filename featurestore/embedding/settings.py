"""What a run is to do, the same for every slide; and the encoders that it names, loaded."""

from dataclasses import dataclass, field, replace

from featurestore.blocks import DEFAULT_BLOCK
from featurestore.embedding.limits import check_spec
from featurestore.embedding.tissue_choice import check_tissue
from featurestore.encoders.loading import DEFAULT_ENCODER, canonical_key, load_encoder, takes_weights
from featurestore.encoders.protocol import Encoder, EncoderOptions
from featurestore.encoders.stain_normalisation import StainedEncoder, check_method
from featurestore.errors import EncoderError
from featurestore.grid import GridSpec, TokenGridSpec
from featurestore.storage.coding import Coding, parse_coding
from featurestore.tissue.flags import parse_skip

NO_STAIN = "none"
"""Stain normalisation that changes nothing."""


@dataclass(frozen=True)
class EmbedSettings:
    """How to embed; the same for every slide of a run.

    Parameters
    ----------
    encoders
        Keys; all are fed from one pass over each slide.
    spec
        The grid; a `TokenGridSpec` for one of tokens.
    options
        How to load the encoders; their `tokens` are those of `spec`.
    tissue
        Name of the `TissueMethod` that tells which patches are encoded; ``none`` encodes every patch. None: the mask of
        a slide that has one, else ``texture``.
    retry_failed
        Compute blocks again in which a tissue patch has no vector, or which are damaged. Stored blocks are read to find
        them.
    block_shape
        Patches in one stored object; on a token grid positions, rounded down to whole patches.
    weights
        ``(encoder key, file)`` of encoders that have files of their own; the others follow `options`.
    store_as
        How embeddings are coded, see `featurestore.storage.coding`; None for ``float16``, or as those that were begun.
    masks
        Folder with a mask or annotation file for each slide, named by its id; None for the sheet's column mask.
    skip
        Names of quality flags (`featurestore.tissue.flags`) whose patches are left out.
    within, without
        Classes of the masks to which tissue is restricted, and those that are left out.
    stain
        ``macenko`` or ``reinhard``: normalise the stain of each slide before its patches are encoded. It is part of the
        encoders' identity.
    private
        Keep file names and paths out of the store, see `featurestore.storage.private_map`.
    allow_duplicates
        Embed a slide that the store, or an earlier row, has under another id.
    """

    encoders: tuple[str, ...] = (DEFAULT_ENCODER,)
    spec: GridSpec = field(default_factory=GridSpec)
    options: EncoderOptions = field(default_factory=EncoderOptions)
    tissue: str | None = None
    retry_failed: bool = False
    block_shape: tuple[int, int] = DEFAULT_BLOCK
    weights: tuple[tuple[str, str], ...] = ()
    store_as: str | None = None
    masks: str | None = None
    within: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    stain: str = NO_STAIN
    skip: tuple[str, ...] = ()
    private: bool = False
    allow_duplicates: bool = False

    @property
    def coding(self) -> Coding | None:
        """How embeddings are coded, if it is said."""
        return None if self.store_as is None else parse_coding(self.store_as)

    def __post_init__(self) -> None:
        # Here, not at the first slide: an unknown name must not fail ten thousand slides one by one.
        check_tissue(self)
        if self.stain != NO_STAIN:
            check_method(self.stain)
        check_spec(self.spec)
        object.__setattr__(self, "skip", parse_skip(self.skip))
        _ = self.coding  # refused here if there is none of that name
        tokens = self.spec if isinstance(self.spec, TokenGridSpec) else None
        object.__setattr__(self, "options", replace(self.options, tokens=tokens))


def load_encoders(settings: EmbedSettings) -> dict[str, Encoder]:
    """Load the encoders of a run by key, in order, each once.

    Raises
    ------
    EncoderError
        If an encoder cannot be loaded, weights are named for one that is not used, or there is no network to compile.
    """
    files = {canonical_key(key): file for key, file in settings.weights}
    keys = dict.fromkeys(canonical_key(key) for key in settings.encoders)
    if unused := set(files) - set(keys):
        raise EncoderError(
            f"--weights names {', '.join(sorted(unused))}, but the encoders are {', '.join(keys)}"
        )
    # Of several encoders one is enough: the option is for all of them.
    if settings.options.compile and not any(takes_weights(key) for key in keys):
        raise EncoderError(f"{', '.join(keys)}: there is no network to compile; leave --compile out")
    loaded = {key: _load(key, settings.options, files.get(key)) for key in keys}
    if settings.stain == NO_STAIN:
        return loaded
    return {key: StainedEncoder(encoder, settings.stain) for key, encoder in loaded.items()}


def _load(key: str, options: EncoderOptions, weights: str | None) -> Encoder:
    return load_encoder(key, options if weights is None else replace(options, weights=weights))
