"""Paths and URLs as arguments: what cannot be one is refused while the command line is parsed.

Checked here is what the user typed. What stands at the place, such as a store of another kind, is for the functions that
open it.
"""

import json
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import typer

from featurestore.errors import OutputError, StoreError
from featurestore.object_stores.hub_place import check_writable
from featurestore.whole_file import check_output

Place = TypeVar("Place", str, Path)
# POSIX: bytes of a path, and of one name in it, on the usual file systems.
_PATH_BYTES, _NAME_BYTES = 4096, 255
_SHOWN_LETTERS = 60
# A model's document with the names of all its genes has a few MB.
_DOCUMENT_BYTES = 1 << 26


def refuse_empty(arguments: Sequence[str]) -> None:
    """Refuse empty arguments: they come from variables of the shell that are not set, and a path would be the folder."""
    for number, argument in enumerate(arguments, start=1):
        option, equals, value = argument.partition("=")
        if not argument.strip() or (option.startswith("--") and equals and not value.strip()):
            raise StoreError(
                f"argument {number} of the command is empty{f' ({option})' if option.strip() else ''}; is a variable of "
                "the shell not set?"
            )


def readable_place(value: Place | None) -> Place | None:
    """Refuse the name of something to read that is no name, or that would be waited for: a pipe, a device."""
    if value is not None:
        text = _checked_name(value)
        if not _is_url(text):
            _refuse_special(text)
    return value


def samples_place(context: typer.Context, value: str) -> str:
    """Refuse a store or a model where slides go: arguments in the wrong order."""
    return _checked_kind(
        context, readable_place(value) or value, ("feature store", "expression store", "model")
    )


def store_place(context: typer.Context, value: str) -> str:
    """Refuse a file or a model where a store goes."""
    return _checked_kind(context, readable_place(value) or value, ("file", "model"))


def exported_place(context: typer.Context, value: str) -> str:
    """Refuse a model, or a file that is no table of cells, where what is exported goes."""
    if value.lower().endswith(".h5ad"):
        return readable_place(value) or value
    return store_place(context, value)


def expression_place(context: typer.Context, value: str) -> str:
    """Refuse a file, a model or a feature store where maps go."""
    return _checked_kind(context, readable_place(value) or value, ("file", "model", "feature store"))


def model_place(context: typer.Context, value: str) -> str:
    """Refuse a file or a store where a trained model goes."""
    kinds = ("file", "feature store", "expression store")
    return _checked_kind(context, readable_place(value) or value, kinds)


def earlier_model(context: typer.Context, value: str | None) -> str | None:
    """Refuse a file or a store where an option names a trained model."""
    return None if value is None else model_place(context, value)


def new_store(context: typer.Context, value: str) -> str:
    """Refuse a place where no store can be made, or that is a file or a model."""
    # A store on a read-only disk that is complete needs no write: running again says so.
    is_there = _kind(Path(value)) in ("feature store", "expression store")
    return _checked_kind(context, value if is_there else output_folder(value) or value, ("file", "model"))


def new_model(context: typer.Context, value: Path) -> Path:
    """Refuse a place where no folder for a model can be made, or that is a store."""
    return _checked_kind(context, output_folder(value) or value, ("feature store", "expression store"))


def _checked_kind(context: typer.Context, value: Place, wrong: tuple[str, ...]) -> Place:
    found = _kind(Path(value))
    if found in wrong:
        order = " ".join(p.metavar or "" for p in context.command.params if p.param_type_name == "argument")
        article = "an" if found[0] in "aeiou" else "a"
        raise StoreError(
            f"{_shown(str(value))} is {article} {found}; the order is: {context.command_path} {order}"
        )
    return value


def _kind(path: Path) -> str:
    """Return what stands at a path of this machine, as far as its first document shows; empty if that is unknown."""
    if path.is_file():
        return "file"
    if _spec_of(path / "config.json") == "histosge-model":
        return "model"
    spec = _spec_of(path / "zarr.json")
    return {"histosge-expression": "expression store", "histosge-featurestore": "feature store"}.get(spec, "")


def _spec_of(document: Path) -> str:
    try:
        with document.open("rb") as stream:
            found = json.loads(stream.read(_DOCUMENT_BYTES))
    except (OSError, ValueError, RecursionError):  # absent, longer, or no JSON: not one of ours
        return ""
    if not isinstance(found, dict):
        return ""
    attributes = found.get("attributes")
    return str(found.get("spec") or (attributes.get("spec") if isinstance(attributes, dict) else ""))


def output_file(value: Place | None) -> Place | None:
    """Refuse a place where no file can be written."""
    if value is not None:
        text = _checked_name(value)
        check_writable(text)
        # A Path has lost the second slash of a URL; such outputs are refused by the functions, with what to do.
        if ":/" not in text:
            check_output(text)
    return value


def output_folder(value: Place | None) -> Place | None:
    """Refuse a place where no folder can be made; a URL is left to the store behind it."""
    if value is not None:
        text = _checked_name(value)
        check_writable(text)
        if ":/" not in text:
            check_output(text, folder=True)
    return value


def output_place(value: Place | None) -> Place | None:
    """Refuse a place where neither a file nor a folder can be written: which of them it is depends on the format."""
    if value is not None:
        text = _checked_name(value)
        check_writable(text)
        if ":/" not in text:
            _refuse_special(text)
            check_output(text, folder=Path(text).is_dir())
    return value


def log_file(value: Path | None) -> Path | None:
    """Refuse a log that cannot be appended to, before the command begins."""
    if value is None:
        return None
    text = _checked_name(value)
    _refuse_special(text)
    try:
        # Opened, as each line will open it: permission, a missing folder and a folder in its place are found now.
        with value.open("a"):
            pass
    except OSError as error:
        raise OutputError(f"--log {_shown(text)} cannot be written: {error.strerror}; name a file") from error
    return value


def _is_url(text: str) -> bool:
    return "://" in text


def _checked_name(value: str | Path) -> str:
    text = str(value)
    if "\0" in text:
        raise StoreError(f"{_shown(text)!r} holds a NUL character; no file can have that name")
    encoded = os.fsencode(text)
    longest = max((len(part) for part in encoded.split(b"/")), default=0)
    if not _is_url(text) and (longest > _NAME_BYTES or len(encoded) > _PATH_BYTES):
        raise StoreError(
            f"the name {_shown(text)!r} has {longest} bytes; file systems allow {_NAME_BYTES}, and {_PATH_BYTES} in a path"
        )
    return text


def _refuse_special(text: str) -> None:
    """Refuse pipes, devices and sockets: reading one may wait for ever, and writing one makes no file."""
    try:
        mode = os.stat(text).st_mode  # noqa: PTH116
    except OSError:  # not there, or not to be reached: the function that opens it says so
        return
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise StoreError(f"{_shown(text)} is a pipe, a device or a socket; give a file or a folder")


def _shown(text: str) -> str:
    return text if len(text) <= _SHOWN_LETTERS else f"{text[:_SHOWN_LETTERS]}..."
