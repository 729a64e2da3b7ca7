"""Encoders with weights: a record's network, its published or given weights, its preprocessing and pooling.

Also any timm model by name, ``timm:vit_small_patch16_224``, with timm's own preprocessing and pooling.
"""

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from featurestore.encoders.adapters import Adapter, adapter_folder, read_adapter
from featurestore.encoders.architecture import build, check_against, check_config, pool
from featurestore.encoders.author_packages import load_package
from featurestore.encoders.device import pick_device
from featurestore.encoders.hub import fetch_config, fetch_weights
from featurestore.encoders.network_encoder import NetworkEncoder
from featurestore.encoders.openvino_engine import compile_with_openvino
from featurestore.encoders.precision import pick_precision
from featurestore.encoders.preprocessing import Preprocess
from featurestore.encoders.protocol import EncoderIdentity, EncoderOptions
from featurestore.encoders.records import TIMM_PREFIX, EncoderRecord, Preprocessing, Published
from featurestore.encoders.timm_import import import_timm
from featurestore.encoders.token_network import encode_groups, fit_groups, token_dim
from featurestore.encoders.tokens import Groups
from featurestore.encoders.uninitialised import without_initialisation
from featurestore.encoders.variants import other_variant, refuse_file_of_another
from featurestore.encoders.weights import file_sha256, load_weights
from featurestore.errors import EncoderError, first_line
from featurestore.software import version

RANDOM_SEED = 0
"""Of `--random-weights`: the same network on every machine, so that a run can be resumed and compared."""
ENGINES = ("torch", "openvino")


def load_record(record: EncoderRecord, options: EncoderOptions) -> NetworkEncoder:
    """Load the encoder of a record.

    Raises
    ------
    EncoderError
        If the weights cannot be had, are not the published ones or do not fit, or the record and what was loaded
        disagree.
    """
    device = pick_device(options.device)
    precision = pick_precision(options.precision, record.dtype, device)
    _check_engine(record, options, device)
    groups = None if options.tokens is None else fit_groups(record, options.tokens)
    if record.package == "timm":
        model = _build(record, options)
        check_against(record, model)  # before the download of gigabytes
        weights = _fill(model, record, options)
        network = _pooled(model.eval().to(device), record, options, groups)
        if options.engine == "openvino":
            network = compile_with_openvino(model, network, record.preprocessing.input_px, precision)
    else:
        path, weights = _weights(record, options)
        network = load_package(record, path, device)
    facts = identity_facts(record, weights, precision, options.engine)
    identity = EncoderIdentity(record.key, record.dim, facts)
    if groups is not None:
        identity = groups.identity(identity, token_dim(record))
    preprocess = Preprocess(record.preprocessing, device)
    casts = options.engine == "torch"
    return NetworkEncoder(identity, network, preprocess, device, precision, casts=casts, batch=options.batch)


def identity_facts(
    record: EncoderRecord, weights: str, precision: str, engine: str = "torch"
) -> dict[str, Any]:
    """Return what decides the vectors of a record's encoder.

    Parameters
    ----------
    record
        What it is.
    weights
        What they are: ``sha256 ...`` of a file, or the seed of random ones.
    precision, engine
        Of the arithmetic, as they were chosen.
    """
    # These names and values are hashed into the fingerprints that stores hold: none may change.
    return {
        "architecture": record.architecture or record.package,
        "arguments": record.arguments,
        "weights": weights,
        "pooling": record.pooling,
        "prefix_tokens": record.prefix_tokens,
        "steps": record.preprocessing.steps(),
        "dtype": precision,
        # Left out where the table is that of the input, as in the first fingerprints.
        **({} if record.positions is None else {"positions": record.positions.facts()}),
        # Left out where there is none, as in the first fingerprints.
        **({} if record.projection is None else {"projection": record.projection.facts()}),
        # Left out for torch, the only engine when the first fingerprints were stored.
        **({} if engine == "torch" else {"engine": engine}),
    }


def _check_engine(record: EncoderRecord, options: EncoderOptions, device: torch.device) -> None:
    if options.engine not in ENGINES:
        raise EncoderError(f"unknown engine {options.engine!r}: use one of {', '.join(ENGINES)}")
    if options.engine == "openvino" and (device.type != "cpu" or record.package != "timm" or options.compile):
        raise EncoderError(
            f"OpenVINO runs networks of timm on a CPU, and does not go with --compile; for {record.key} on {device.type} "
            "use --engine torch"
        )


def load_timm(key: str, options: EncoderOptions) -> NetworkEncoder:
    """Load any timm model by its name, ``timm:<name>`` or ``timm:<name>.<tag>`` for timm's published weights."""
    return load_record(timm_record(key), options)


def timm_record(key: str) -> EncoderRecord:
    """Describe a timm model as timm itself configures it.

    Raises
    ------
    EncoderError
        If timm has no such model; the nearest names are given.
    """
    timm = import_timm()
    name = key.removeprefix(TIMM_PREFIX)
    if not timm.is_model(name):
        near = get_close_matches(name, timm.list_models(), n=3)
        raise EncoderError(f"timm has no model {name!r}; near: {', '.join(near) or 'see timm.list_models()'}")
    try:
        # On the meta device: its shapes are needed, not its weights.
        with torch.device("meta"), without_initialisation():
            model = timm.create_model(name, pretrained=False, num_classes=0)
    except RuntimeError as error:
        raise EncoderError(f"timm has no weights called {name!r}: {first_line(error)}") from error
    config = timm.data.resolve_model_data_config(model)
    hub = model.pretrained_cfg.get("hf_hub_id") if "." in name else None
    return EncoderRecord(
        name=key,
        pooling="network's own",
        dim=int(getattr(model, "head_hidden_size", None) or model.num_features),
        package="timm",
        architecture=name.partition(".")[0],
        arguments={},
        parameters=None,
        prefix_tokens=getattr(model, "num_prefix_tokens", None),
        preprocessing=Preprocessing(
            int(config["input_size"][-1]),
            None,
            "bilinear" if config["interpolation"] == "bilinear" else "bicubic",
            tuple(config["mean"]),
            tuple(config["std"]),
        ),
        mpp=(),
        dtype="fp32",
        state="timm",
        published=Published(hub, None, "model.safetensors", None, gated=False) if hub else None,
        source=f"timm {version('timm')}",
    )


def _build(record: EncoderRecord, options: EncoderOptions) -> Any:
    if options.random_weights and options.weights is None:
        return _build_random(record)
    # A file fills every weight: one that leaves any out is refused.
    with without_initialisation():
        return build(record)


def _build_random(record: EncoderRecord) -> Any:
    # Seeds on a fork of torch's generator: loading an encoder must not reseed a training run.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(RANDOM_SEED)
        return build(record)


def _fill(model: Any, record: EncoderRecord, options: EncoderOptions) -> str:
    """Put the weights into a network, and return what they are, for the identity."""
    if options.random_weights and options.weights is None:
        return f"random seed {RANDOM_SEED}"
    base, adapter = split_adapter(options.weights)
    path, weights = _weights(record, replace(options, weights=base))
    digest = weights.removeprefix("sha256 ")
    hint = partial(other_variant, digest=digest)
    change = (lambda raw: raw) if adapter is None else adapter.apply
    load_weights(model, path, record.state, record.positions, hint, change)
    # After the shapes, whose message says more of a file of another network.
    refuse_file_of_another(record, path, digest)
    return weights if adapter is None else f"{weights} {adapter.fact}"


def split_adapter(weights: str | None) -> tuple[str | None, Adapter | None]:
    """Split ``--weights`` into the base's file (None for the published one) and an adapter, if it names one.

    ``ADAPTER`` is a change of the published weights, ``BASE+ADAPTER`` of those of a file.

    Raises
    ------
    EncoderError
        If the adapter cannot be read.
    """
    if weights is None:
        return None, None
    # A file whose name has a plus in it is meant as it is.
    base, plus, last = ("", "", weights) if Path(weights).exists() else weights.rpartition("+")
    folder = adapter_folder(Path(last))
    if folder is None:
        return weights, None
    return (base if plus else None), read_adapter(folder)


def _weights(record: EncoderRecord, options: EncoderOptions) -> tuple[Path, str]:
    if options.weights is not None:
        path = Path(options.weights)
        if not path.is_file():
            raise EncoderError(f"there is no weights file at {path}")
        return path, f"sha256 {file_sha256(path)}"
    if options.random_weights or record.published is None:
        can = "" if record.package != "timm" else ", or --random-weights to try the machinery only"
        raise EncoderError(f"{record.key} needs weights: give --weights FILE{can}")
    path, digest = fetch_weights(record.key, record.published)
    if record.package == "timm":
        check_config(record, fetch_config(record.key, record.published))
    return path, f"sha256 {digest}"


def _has_compiler() -> bool:
    return any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "g++", "clang++"))


def _pooled(
    model: Any, record: EncoderRecord, options: EncoderOptions, groups: Groups | None
) -> Callable[[Tensor], Tensor]:
    # Channels last makes convolutions on a CPU half as fast again; transformers gain nothing.
    layout = torch.preserve_format if hasattr(model, "patch_embed") else torch.channels_last
    model = model.to(memory_format=layout)

    def network(images: Tensor) -> Tensor:
        images = images.to(memory_format=layout)
        if groups is not None:
            return encode_groups(model, images, record, groups)
        return pool(model, images, record.pooling, record.prefix_tokens)

    if not options.compile:
        return network
    if pick_device(options.device).type == "cpu" and not _has_compiler():
        raise EncoderError(
            "--compile needs a C++ compiler, and there is none here: install g++, or leave it out"
        )
    compiled: Callable[[Tensor], Tensor] = torch.compile(network, dynamic=False)
    return compiled
