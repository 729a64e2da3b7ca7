"""What a saved model was trained on: its card, and what the card asks of an embedding."""

from dataclasses import dataclass
from typing import Any

from featurestore.grid import GridSpec, TokenGridSpec
from histosge.heldout.donors import donors_if_named


@dataclass(frozen=True)
class ModelCard:
    """What a saved model was trained on; all of it JSON-ready.

    Parameters
    ----------
    preset
        Registered name of the model class, or ``module:Class``; see `load_model`.
    genes
        Names of the outputs, in order.
    encoder
        Key, dim, facts and fingerprint of the embeddings that it was trained on.
    grid
        mpp, patch and stride of those embeddings.
    normalisation
        How targets were made from counts, and the floor on counts per spot.
    sections
        Per training section: slide id, donor, fingerprint of the slide, spots used and left out.
    seed
        Of the training.
    trusted
        How many genes are trusted, of how many, and the scope of that; None where the model was not calibrated, and in
        models of earlier versions.
    origin
        Of a model that was adapted (`histosge.models.adaptation`): fingerprint, sections and spots of the earlier one. Its
        sections come first in `sections`. Else None, and not written.
    """

    preset: str
    genes: tuple[str, ...]
    encoder: dict[str, Any]
    grid: dict[str, Any]
    normalisation: dict[str, Any]
    sections: tuple[dict[str, Any], ...]
    seed: int
    trusted: dict[str, Any] | None = None
    origin: dict[str, Any] | None = None

    @property
    def donors(self) -> set[str]:
        """Return the donors of the training sections; none where they are not named."""
        pairs = [
            (str(section.get("slide_id", "")), str(section.get("donor") or "")) for section in self.sections
        ]
        donors = set(donors_if_named(pairs))
        return donors if all(donors) else set()


def embed_options(spec: GridSpec) -> str:
    """Return the options of `histosge embed` that make a grid."""
    patches = spec.encoded
    options = f"--mpp {patches.mpp} --patch {patches.patch_px}"
    if not isinstance(spec, TokenGridSpec):
        return f"{options} --stride {patches.stride_px}"
    options += f" --tokens {spec.tokens}{'+cls' if spec.token_cls else ''}"
    return options + (f" --token-overlap {spec.token_overlap_px}" if spec.token_overlap_px else "")
