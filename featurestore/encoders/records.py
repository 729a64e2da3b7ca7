"""The field's encoders as records: what each one is, exactly, before any weight is loaded.

Reads `encoders/records.toml` and nothing else: no torch, no network.

Terms
    name      of an encoder, such as ``virchow2``
    pooling   how patch tokens become one vector: ``cls``, ``cls+mean``, ...
    key       ``name`` for the default pooling, ``name@pooling`` for any other; what a store records
"""

import tomllib
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.resources import files
from typing import Any


@dataclass(frozen=True)
class Preprocessing:
    """What happens to a patch before the network sees it.

    Parameters
    ----------
    resize_px
        Side after resampling; patches that have it already are not touched.
    crop_px
        Side of the centre crop that follows; None for none.
    interpolation
        ``bilinear`` or ``bicubic``, both with antialiasing.
    mean, std
        Of R, G, B in [0, 1].
    """

    resize_px: int
    crop_px: int | None
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def input_px(self) -> int:
        """Side that the network sees."""
        return self.crop_px or self.resize_px

    def steps(self) -> list[dict[str, Any]]:
        """Return the steps in order, JSON-ready: part of an encoder's identity."""
        steps: list[dict[str, Any]] = [
            {"resize": self.resize_px, "interpolation": self.interpolation, "antialias": True, "to": "uint8"}
        ]
        # A crop of the size that the resampling gives removes nothing, so it is no step and changes no fingerprint.
        if self.crop_px is not None and self.crop_px != self.resize_px:
            steps.append({"centre_crop": self.crop_px})
        return [*steps, {"divide": 255}, {"mean": list(self.mean), "std": list(self.std)}]


@dataclass(frozen=True)
class Positions:
    """A table of position embeddings that was trained for another input than the record's.

    Parameters
    ----------
    grid
        Side of the published table, in tokens.
    antialias
        Of the bicubic resampling: timm resamples with it, transformers without.
    """

    grid: int
    antialias: bool

    def facts(self) -> dict[str, Any]:
        """Return what decides the vectors, JSON-ready: the two ways of resampling differ by several per cent."""
        return {"grid": self.grid, "interpolation": "bicubic", "antialias": self.antialias}


@dataclass(frozen=True)
class Projection:
    """What an image-text model puts after its image tower: from the class token into the space shared with text.

    Parameters
    ----------
    widths
        Of its linear layers, in order; a GELU stands between two of them.
    bias
        Whether the layers add one.
    normalised
        Whether the authors' image vectors are divided by their length.
    """

    widths: tuple[int, ...]
    bias: bool
    normalised: bool

    def facts(self) -> dict[str, Any]:
        """Return what decides the vectors, JSON-ready."""
        return {"widths": list(self.widths), "bias": self.bias, "normalised": self.normalised}


@dataclass(frozen=True)
class Published:
    """Where an encoder's weights are published.

    Parameters
    ----------
    repository
        On the hub, ``owner/name``.
    revision
        A commit; None where none is known, and the newest is taken.
    file
        In the repository.
    sha256
        First 16 hex digits of the file's sha256; None where it is not known.
    gated
        Its licence has to be accepted by an account first.
    pin_sources
        Independent public sources in which the revision was read, at least.
    """

    repository: str
    revision: str | None
    file: str
    sha256: str | None
    gated: bool
    pin_sources: int = 0


@dataclass(frozen=True)
class PublishedConfig:
    """The network as it was published, in figures of its own, not in timm's arguments.

    Parameters
    ----------
    image_px, patch_px
        Sides of the input of its training, and of one token.
    width, depth, heads
        Of the tokens; blocks; attention heads of a block.
    mlp
        Width of the MLP's first matrix; of both parts together where it is SwiGLU.
    swiglu, layer_scale
        Whether it has them.
    registers
        Tokens besides class and patches.
    positions
        Rows of the table of positions.
    eps
        Of its layer norms.
    activation
        Of an MLP that is no SwiGLU: ``gelu``, or ``quick_gelu`` of OpenAI's CLIP.
    projection
        Widths of the linear layers behind an image tower; empty where there are none.
    parameters
        In millions, without classifier, pooler and mask token, with the projection; None if unknown.
    source
        Where this was read.
    """

    image_px: int
    patch_px: int
    width: int
    depth: int
    heads: int
    mlp: int
    swiglu: bool = False
    layer_scale: bool = False
    registers: int = 0
    positions: int = 0
    eps: float = 1e-6
    activation: str = "gelu"
    projection: tuple[int, ...] = ()
    parameters: float | None = None
    source: str = ""


@dataclass(frozen=True)
class EncoderRecord:
    """One encoder in one variant.

    Parameters
    ----------
    name, pooling
        See the head of this file.
    dim
        Width of the vector.
    package
        What loads it: ``timm``, or another package that has to be installed for it.
    architecture, arguments
        What timm builds; `arguments` name classes by their names.
    parameters
        Of the network without a classifier, with its projection; None if unknown.
    prefix_tokens
        Class and register tokens; None for networks without tokens.
    preprocessing
        See there.
    mpp
        Microns per pixel that its authors advise; empty where they state none.
    dtype
        That they advise on a GPU: ``fp32``, ``fp16`` or ``bf16``.
    state
        Names of tensors in the weights file, one of `state_layouts.LAYOUTS`.
    published
        Where the weights are; None if they are not published.
    positions
        Of the published table of positions, where it is not that of the input.
    projection
        Behind an image tower; None where the tower's own vector is the encoder's.
    config_norm
        Mean and std that the repository's own config is known to give wrongly.
    config
        The published network in figures; None for a network that has no record of its own.
    oracle
        What `verification` compares the record with; empty where there is no other implementation at hand.
    title, licence, source
        For listings: what it is called and whose it is, its licence, and where these facts were read.
    is_default
        Whether `pooling` is its authors' choice, which the bare name means.
    """

    name: str
    pooling: str
    dim: int
    package: str
    architecture: str
    arguments: dict[str, Any] = field(hash=False)
    parameters: int | None
    prefix_tokens: int | None
    preprocessing: Preprocessing
    mpp: tuple[float, ...]
    dtype: str
    state: str
    published: Published | None
    positions: Positions | None = None
    projection: Projection | None = None
    config_norm: tuple[tuple[float, ...], tuple[float, ...]] | None = None
    config: PublishedConfig | None = None
    oracle: str = ""
    title: str = ""
    licence: str = ""
    source: str = ""
    is_default: bool = True

    @property
    def key(self) -> str:
        """What a user types and a store records."""
        return self.name if self.is_default else f"{self.name}@{self.pooling}"


@lru_cache(maxsize=1)
def records() -> dict[str, EncoderRecord]:
    """Return every record by its key, defaults first within a name."""
    data = tomllib.loads((files("featurestore") / "encoders" / "records.toml").read_text())
    found = [
        _record(name, entry, data["norm"], pooling)
        for name, entry in data["encoder"].items()
        for pooling in entry["poolings"]
    ]
    return {record.key: record for record in found}


def find(key: str) -> EncoderRecord | None:
    """Return the record of a key; ``name@pooling`` also finds the default; None if there is none."""
    # A store records the short form, so `name@default pooling` has to find the same record as `name`.
    known = records()
    if key in known:
        return known[key]
    name, _, pooling = key.partition("@")
    record = known.get(name)
    return record if record is not None and record.pooling == pooling else None


def _record(name: str, entry: dict[str, Any], norms: dict[str, Any], pooling: str) -> EncoderRecord:
    def norm(which: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
        return tuple(norms[which]["mean"]), tuple(norms[which]["std"])

    mean, std = norm(entry["norm"])
    million = entry.get("parameters")
    return EncoderRecord(
        name=name,
        pooling=pooling,
        dim=entry["poolings"][pooling],
        package=entry.get("package", "timm"),
        architecture=entry.get("architecture", ""),
        arguments=entry.get("arguments", {}),
        # Rounded: a product of floats need not be whole, and the count is compared exactly.
        parameters=None if million is None else round(million * 1e6),
        prefix_tokens=entry.get("prefix_tokens"),
        preprocessing=Preprocessing(
            entry["resize_px"], entry.get("crop_px"), entry["interpolation"], mean, std
        ),
        mpp=tuple(entry["mpp"]),
        dtype=entry["dtype"],
        state=entry.get("state", "timm"),
        published=Published(
            entry["hub"],
            entry.get("revision"),
            entry["file"],
            entry.get("sha256"),
            entry["gated"],
            entry.get("pin_sources", 0),
        ),
        positions=Positions(**entry["positions"]) if "positions" in entry else None,
        projection=_projection(entry["projection"]) if "projection" in entry else None,
        config_norm=norm(entry["config_norm"]) if "config_norm" in entry else None,
        config=_config(entry["config"], entry["config_source"]),
        oracle=entry.get("oracle", ""),
        title=entry["title"],
        licence=entry["licence"],
        source=entry["source"],
        # TOML keeps the order of its keys.
        is_default=pooling == next(iter(entry["poolings"])),
    )


def _projection(entry: dict[str, Any]) -> Projection:
    return Projection(**{**entry, "widths": tuple(entry["widths"])})


def _config(entry: dict[str, Any], source: str) -> PublishedConfig:
    # A tuple, since records are hashed.
    return PublishedConfig(**{**entry, "projection": tuple(entry.get("projection", ()))}, source=source)


TIMM_PREFIX = "timm:"
"""Of the keys that name a model of timm itself, which has no record here."""
