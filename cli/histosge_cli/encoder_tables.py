"""What `histosge encoders` prints, and how encoders are named on the command line."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featurestore.encoders.loading import ENCODERS, canonical_key, load_encoder, takes_weights
from featurestore.encoders.protocol import EncoderOptions
from featurestore.encoders.records import EncoderRecord, find, records
from featurestore.errors import EncoderError
from featurestore.events import Progress
from featurestore.grid import GridSpec
from featurestore.wording import counted
from histosge_cli.console import Console, out, table

if TYPE_CHECKING:
    from featurestore.encoders.verification.check import RecordCheck

# One magnification is 0.45 to 0.5 microns per pixel from scanner to scanner; the next is a factor of 2 away.
SCALE_TOLERANCE = 0.15
"""Relative difference of microns per pixel from which on a remark is due."""


def list_all(*, as_json: bool) -> None:
    """Print one line per encoder."""
    rows = []
    for extension in ENCODERS.records():
        row: dict[str, Any] = {"key": extension.name, "dim": extension.dim, "about": extension.help}
        if extension.name in records():
            row = _row(records()[extension.name])
        elif extension.name in ENCODERS.own:
            row["licence"] = "MIT"
        rows.append(row)
    rows.append(
        {"key": "timm:<name>", "about": "any timm model; <name>.<tag> for weights that timm publishes"}
    )
    if as_json:
        out.print(json.dumps(rows), markup=False)
        return
    header = ("key", "dim", "px", "microns/px", "params", "dtype", "licence", "gated", "about")
    table(header, ([row.get(name) for name in header] for row in rows))


def _row(record: EncoderRecord) -> dict[str, Any]:
    return {
        "key": record.key,
        "dim": record.dim,
        "px": record.preprocessing.input_px,
        "microns/px": ", ".join(f"{mpp:g}" for mpp in record.mpp),
        "params": None if record.parameters is None else f"{record.parameters / 1e6:.0f} M",
        "dtype": record.dtype,
        "licence": record.licence,
        "gated": "yes" if record.published is not None and record.published.gated else "no",
        "about": record.title + ("" if record.is_default else f", {record.pooling}"),
    }


def show_one(key: str, options: EncoderOptions, *, as_json: bool) -> None:
    """Print one encoder in full: its record where there is one, else the identity that loading it gives."""
    # A record is shown without loading: its weights may be gated, or gigabytes.
    record = find(key)
    facts: dict[str, Any]
    if record is not None and options.weights is None and not options.random_weights:
        facts = _record_facts(record)
    else:
        identity = load_encoder(key, options).identity
        facts = {
            "key": identity.key,
            "dim": identity.dim,
            "fingerprint": identity.fingerprint,
            **identity.facts,
        }
    if as_json:
        out.print(json.dumps(facts), markup=False)
        return
    for name, value in facts.items():
        lines = [str(item) for item in value] if name == "steps" else [str(value)]
        for line in lines:
            out.print(f"{name:17} {line}", markup=False)
            name = ""  # of the further lines of one fact


def _record_facts(record: EncoderRecord) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "key": record.key,
        "about": record.title,
        "pooling": record.pooling,
        "dim": record.dim,
        "loaded by": record.package,
        "architecture": record.architecture or None,
        "arguments": record.arguments,
        "parameters": record.parameters,
        "prefix tokens": record.prefix_tokens,
        **({} if record.positions is None else {"positions": record.positions.facts()}),
        **({} if record.projection is None else {"projection": record.projection.facts()}),
        "published network": record.config
        and {k: v for k, v in vars(record.config).items() if k != "source"},
        "read in": record.config and record.config.source,
        "steps": record.preprocessing.steps(),
        "microns/px": list(record.mpp) or "the authors state none",
        "dtype on a GPU": record.dtype,
        "licence": record.licence,
        "source": record.source,
    }
    if record.published is not None:
        published = record.published
        facts |= {
            "hub": published.repository,
            "revision": published.revision or "the newest; its sha256 enters the fingerprint",
            "revision read in": _sources(published.pin_sources),
            "file": published.file,
            "sha256": f"{published.sha256}..." if published.sha256 else "not known",
            "gated": "yes: accept the licence on its page, then `hf auth login`" if published.gated else "no",
        }
    variants = [other.key for other in records().values() if other.name == record.name]
    return {**facts, "variants": ", ".join(variants)}


def _sources(count: int) -> str:
    return "no source" if count == 0 else counted(count, "independent source")


def golden(key: str, options: EncoderOptions) -> None:
    """Print an encoder's golden vector, in short."""
    from featurestore.encoders.golden import golden as make

    encoder = load_encoder(key, options)
    found = make(encoder)
    out.print(f"key          {encoder.identity.key}", markup=False)
    out.print(f"fingerprint  {encoder.identity.fingerprint}", markup=False)
    out.print(f"golden       {found.digest}", markup=False)
    out.print(f"first values {' '.join(f'{value:+.4f}' for value in found.first)}", markup=False)
    out.print(f"length       {found.norm:.4f}", markup=False)


def check(key: str | None, *, as_json: bool) -> bool:
    """Compare the records with the published networks, print a row for each, and return whether none disagrees.

    Parameters
    ----------
    key
        Only this encoder and its variants; None for all.
    as_json
        Print JSON in place of a table.

    Raises
    ------
    EncoderError
        If no record has this key, or transformers is needed and not installed.
    """
    from featurestore.encoders.verification.check import check_records

    one = None if key is None else find(key)
    if key is not None and one is None:
        raise EncoderError(f"{key!r} has no record to check; see the keys with: histosge encoders")
    chosen = [record for record in records().values() if one is None or record.name == one.name]
    found = []
    with Console().steps("compare") as on_progress:
        for record, row in zip(chosen, check_records(chosen), strict=True):
            found.append((record, row))
            on_progress(Progress(len(found), len(chosen), record.key))
    rows = [{**_published_facts(record), **_outcome(row)} for record, row in found]
    if as_json:
        out.print(json.dumps(rows), markup=False)
    else:
        table(tuple(rows[0]), (list(row.values()) for row in rows))
    return all(row.agrees for _, row in found)


def _published_facts(record: EncoderRecord) -> dict[str, Any]:
    config = record.config
    if config is None:
        return {"key": record.key}
    return {
        "key": record.key,
        "px": config.image_px,
        "token px": config.patch_px,
        "width": config.width,
        "depth": config.depth,
        "MLP": f"{config.mlp} SwiGLU" if config.swiglu else str(config.mlp),
        "registers": config.registers,
        "positions": config.positions or None,
        "params": None if config.parameters is None else f"{config.parameters:.4f} M",
    }


def _outcome(row: "RecordCheck") -> dict[str, Any]:
    same = None if row.tensors is None else f"{row.tensors} tensors equal"
    return {
        "compared with": row.oracle,
        "at full size": row.misfit or same,
        "cosine": None if row.cosine is None else f"{row.cosine:.6f}",
        "agrees": {True: "yes", False: "NO"}[row.agrees] if row.tensors is not None else "not compared",
    }


def download(key: str, folder: Path) -> None:
    """Load an encoder's published weights into a folder, and print how to use them on another machine."""
    from featurestore.encoders.hub import fetch_weights

    record = find(key)
    if record is None or record.published is None:
        raise EncoderError(
            f"{key!r} has no published weights that are known here; see the keys with: histosge encoders"
        )
    path, digest = fetch_weights(record.key, record.published, folder)
    out.print(f"{path}: sha256 {digest}", markup=False)
    out.print(f"use it with: --encoder {record.key} --weights {path}", markup=False)


def weights_option(values: Sequence[str], keys: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """Tell which encoder each ``--weights`` belongs to.

    Raises
    ------
    EncoderError
        If a plain FILE could belong to several encoders.
    """
    found = []
    for value in values:
        key, equals, file = value.partition("=")
        if equals and canonical_key(key) in {canonical_key(known) for known in keys}:
            found.append((key, file))
            continue
        # A plain FILE: the only encoder that can take one. A path with "=" in it lands here, too.
        takers = [known for known in keys if takes_weights(known)] or list(keys)
        if len(takers) > 1:
            raise EncoderError(
                f"--weights {value} could belong to {' or '.join(takers)}: write --weights {takers[0]}={value}"
            )
        found.append((takers[0], value))
    return tuple(found)


def scale_remarks(keys: Sequence[str], spec: GridSpec) -> list[str]:
    """Return a remark for each encoder that would see another magnification than its authors advise."""
    found = []
    for key in keys:
        record = find(key)
        if record is None or not record.mpp:
            continue
        # The patch is resampled to the network's input, so this is the scale that the network sees.
        seen = spec.mpp * spec.encoded.patch_px / record.preprocessing.resize_px
        if all(abs(seen / mpp - 1) > SCALE_TOLERANCE for mpp in record.mpp):
            wanted = min(record.mpp, key=lambda mpp: abs(mpp - seen))
            found.append(
                f"{key} was made for {wanted:g} microns per pixel and would see {seen:.3g} here; its own scale: "
                f"--mpp {wanted:g} --patch {record.preprocessing.resize_px}"
            )
    return found
