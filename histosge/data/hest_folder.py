"""A HEST-1k folder as published -> the rows of a sample sheet.

Layout as the public repository mahmoodlab/HEST reads it (``HESTData.py`` at afd42c3): ``st/ID.h5ad``, ``wsis/ID.tif``,
``metadata/ID.json``, ``tissue_seg/ID_contours.geojson``, and beside the folders the metadata table ``HEST_v*.csv``. The
scale is ``pixel_size_um_estimated``, from the pitch of the spots, which the authors' own code takes, too. The authors
split by study and patient, and count a study without patients as one patient; so does the donor here. Nothing is opened
but metadata: whether a slide can be read is known when it is embedded.
"""

import csv
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from featurestore.errors import SampleSheetError, first_line
from featurestore.slides.protocol import MPP_RANGE
from featurestore.slides.sheet_listing import SheetListing
from histosge.data.expression.loaded_expression import read_json
from histosge.errors import ExpressionError

MAX_TABLE_BYTES = 64 << 20
"""The published table has 0.4 MB."""
MPP = "pixel_size_um_estimated"
NO_PATIENT = "Patient 1"
"""Patient of a study that names none: the authors' rule, by which its sections are never split."""
_NONE = ("", "nan", "none", "null", "na")


@dataclass(frozen=True)
class HestFilter:
    """Which samples to take; None takes all. Case does not count.

    Parameters
    ----------
    organ, species, oncotree, technology
        Values of the metadata, such as ``Breast``, ``Homo sapiens``, ``IDC``, ``Visium``.
    """

    organ: str | None = None
    species: str | None = None
    oncotree: str | None = None
    technology: str | None = None

    @property
    def wanted(self) -> dict[str, str]:
        """Return the fields of the metadata that must have a value."""
        fields = {
            "organ": self.organ,
            "species": self.species,
            "oncotree_code": self.oncotree,
            "st_technology": self.technology,
        }
        return {name: value for name, value in fields.items() if value is not None}


def list_hest(folder: Path, chosen: HestFilter) -> SheetListing:
    """List the samples of a HEST-1k folder, sorted by id.

    Raises
    ------
    SampleSheetError
        If it is no such folder, no sample has the wanted values (those that there are follow), or none can be used.
    """
    if not (folder / "st").is_dir():
        raise SampleSheetError(
            f"{folder} is no HEST-1k folder: it has no folder st; give the one that holds st, wsis and metadata"
        )
    table = _read_tables(folder)
    ids = sorted(file.stem for file in (folder / "st").glob("*.h5ad"))
    if not ids:
        raise SampleSheetError(f"{folder / 'st'} holds no .h5ad: download the samples' st, wsis and metadata")
    rows, left_out = [], []
    seen: dict[str, set[str]] = {name: set() for name in chosen.wanted}
    for sample in ids:
        try:
            about = _metadata(folder, sample, table)
        except ExpressionError as error:
            left_out.append(f"{sample}: {error}")
            continue
        values = {name: _text(about.get(name)) for name in chosen.wanted}
        for name, value in values.items():
            seen[name].add(value)
        # Before the checks: what was not wanted is not reported as left out.
        if any(values[name].lower() != want.strip().lower() for name, want in chosen.wanted.items()):
            continue
        try:
            rows.append(_row(folder, sample, about))
        except ExpressionError as error:
            left_out.append(f"{sample}: {error}")
    if not rows:
        raise SampleSheetError(_nothing(folder, chosen, seen, left_out))
    return SheetListing(tuple(rows), tuple(left_out))


def _row(folder: Path, sample: str, about: Mapping[str, Any]) -> dict[str, str]:
    slide = folder / "wsis" / f"{sample}.tif"
    if not slide.is_file():
        raise ExpressionError(f"there is no slide wsis/{slide.name}; download it")
    mpp = _mpp(about)
    mask = folder / "tissue_seg" / f"{sample}_contours.geojson"
    study, patient = _text(about.get("dataset_title")), _text(about.get("patient")) or NO_PATIENT
    return {
        "slide_id": sample,
        "slide": str(slide.absolute()),
        "expression": str((folder / "st" / f"{sample}.h5ad").absolute()),
        "mpp": repr(mpp),
        # Patients are numbered anew in every study.
        "donor": f"{study}: {patient}" if study else patient,
        "mask": str(mask.absolute()) if mask.is_file() else "",
    }


def _mpp(about: Mapping[str, Any]) -> float:
    stated = about.get(MPP)
    try:
        mpp = float(_text(stated))
    except ValueError:
        mpp = float("nan")
    if not MPP_RANGE[0] <= mpp <= MPP_RANGE[1]:  # NaN is refused, too
        raise ExpressionError(
            f"{MPP} is {_text(stated)[:40] or 'missing'}, and should be {MPP_RANGE[0]} to {MPP_RANGE[1]} microns per pixel"
        )
    return mpp


def _metadata(folder: Path, sample: str, table: Mapping[str, Mapping[str, str]]) -> dict[str, Any]:
    """Return what is known of a sample: the table's row, and over it the sample's own file."""
    file = folder / "metadata" / f"{sample}.json"
    if file.is_file():
        own = {name: value for name, value in read_json(file).items() if _text(value)}
        return {**table.get(sample, {}), **own}
    if sample in table:
        return dict(table[sample])
    raise ExpressionError(
        f"there is no metadata/{file.name}, and no metadata table that names it; download it"
    )


def _read_tables(folder: Path) -> dict[str, dict[str, str]]:
    """Return the rows of the metadata tables by id; of several versions, the last by name counts."""
    rows: dict[str, dict[str, str]] = {}
    for file in sorted([*folder.glob("HEST*.csv"), *(folder / "assets").glob("HEST*.csv")]):
        try:
            rows |= {row["id"]: row for row in _read_table(file)}
        except (OSError, ValueError, KeyError, csv.Error) as error:
            raise SampleSheetError(
                f"{file} is no metadata table: {first_line(error)}; download it again"
            ) from error
    return rows


def _read_table(file: Path) -> Iterator[dict[str, str]]:
    if file.stat().st_size > MAX_TABLE_BYTES:
        raise ValueError(f"it has more than {MAX_TABLE_BYTES >> 20} MB")
    # The published one begins with a byte order mark.
    with file.open(encoding="utf-8-sig", newline="") as lines:
        for row in csv.DictReader(lines, strict=True):
            yield {name: value or "" for name, value in row.items() if name}


def _text(value: Any) -> str:
    """Return a value of the metadata as text; empty where tables hold none."""
    text = "" if value is None else str(value).strip()
    return "" if text.lower() in _NONE else text


def _nothing(folder: Path, chosen: HestFilter, seen: Mapping[str, set[str]], left_out: list[str]) -> str:
    for name, want in chosen.wanted.items():
        there = sorted(value for value in seen[name] if value)
        if want.strip().lower() not in {value.lower() for value in there}:
            near = get_close_matches(want, there, n=3) or there[:8]
            return f"no sample of {folder} has {name} {want!r}; there is {', '.join(near) or 'none'}"
    reasons = "; ".join(left_out[:3]) + ("; ..." if len(left_out) > 3 else "")
    return f"no sample of {folder} can be used: {reasons or 'none has all of the wanted values'}"
