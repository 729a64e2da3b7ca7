"""A manifest of the Genomic Data Commons, or the folder that its client fills -> rows of a sample sheet.

The client writes ``<file id>/<file name>`` below the folder it runs in. A TCGA slide's name begins with its barcode,
``TCGA-A1-A0SB-01Z-00-DX1``: project, site and patient, sample type (01 to 09 are tumours) with vial, portion, and the slide:
DX of formalin-fixed diagnostic sections, TS, BS and MS of frozen ones. Public tools use one diagnostic slide a patient.
"""

import csv
import re
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

from featurestore.errors import SampleSheetError
from featurestore.slides.sheet_listing import SheetListing

MAX_MANIFEST_BYTES = 64 << 20
"""A row takes 150 bytes, and TCGA has 30,000 slides."""
BARCODE = re.compile(r"(TCGA-[A-Z0-9]{2}-[A-Z0-9]{4})-(\d{2})([A-Z])-(\d{2})-([A-Z]{2})([A-Z0-9]*)", re.ASCII)
FILE_ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.ASCII)
DIAGNOSTIC = "DX"
TUMOUR = range(1, 10)
SUFFIX = ".svs"
_COLUMNS = ("id", "filename", "size")
_NAMED = 20


@dataclass(frozen=True)
class _Slide:
    """A diagnostic slide: its file, and what its barcode says."""

    file_id: str
    name: str
    size: int | None
    patient: str
    barcode: str
    sample: int

    @property
    def rank(self) -> tuple[bool, int, str, str]:
        """Order among the slides of a patient: tumour before normal tissue, then by barcode (DX1 before DX2)."""
        return self.sample not in TUMOUR, self.sample, self.barcode, self.name


def list_tcga(source: Path) -> SheetListing:
    """List one diagnostic slide for each patient of a manifest.

    Of a patient's diagnostic slides that were downloaded, the first by sample type and barcode is taken.

    Parameters
    ----------
    source
        A manifest, with the downloads beside it; or the folder of the downloads, with or without a manifest in it.

    Raises
    ------
    SampleSheetError
        If there is no manifest and no download, or no slide of it can be used.
    """
    folder, entries = _entries(source)
    patients: dict[str, list[_Slide]] = defaultdict(list)
    left_out: list[str] = []
    others: Counter[str] = Counter()
    for file_id, name, size in entries:
        if not name.lower().endswith(SUFFIX):
            others["files that are no .svs"] += 1
            continue
        found = BARCODE.match(name)
        if found is None:
            left_out.append(f"{name}: its name does not begin with the barcode of a TCGA slide")
            continue
        patient, sample, _, _, kind, _ = found.groups()
        if kind != DIAGNOSTIC:
            others["frozen sections (TS, BS, MS)"] += 1
            continue
        patients[patient].append(_Slide(file_id, name, size, patient, found[0], int(sample)))
    rows, absent = [], []
    for _, slides in sorted(patients.items()):
        row, reasons = _choose(folder, sorted(slides, key=lambda slide: slide.rank))
        absent += reasons
        if row is not None:
            rows.append(row)
    more = sum(map(len, patients.values())) - len(rows) - len(absent)
    if more:
        others["further diagnostic slides of the same patients"] += more
    left_out += absent[:_NAMED]
    if len(absent) > _NAMED:
        left_out.append(f"and {len(absent) - _NAMED} more diagnostic slides that are not there or not whole")
    if not rows:
        raise SampleSheetError(_nothing(source, folder, len(patients), absent, others))
    left_out += [f"{count} {what}" for what, count in others.items()]
    return SheetListing(tuple(rows), tuple(left_out))


def _choose(folder: Path, slides: list[_Slide]) -> tuple[dict[str, str] | None, list[str]]:
    """Return the row of a patient's first slide that is there whole, and why those before it are not used."""
    reasons = []
    for slide in slides:
        file = next(
            (
                place
                for place in (folder / slide.file_id / slide.name, folder / slide.name)
                if place.is_file()
            ),
            None,
        )
        if file is None:
            reasons.append(f"{slide.name}: not downloaded")
        elif slide.size is not None and file.stat().st_size != slide.size:
            reasons.append(
                f"{slide.name}: has {file.stat().st_size} of {slide.size} bytes; download it again"
            )
        else:
            known = ", ".join(filter(None, (f"file {slide.file_id}" if slide.file_id else "", slide.name)))
            row = {
                "slide_id": slide.barcode,
                "slide": str(file.absolute()),
                "donor": slide.patient,
                "known": known,
            }
            return row, reasons
    return None, reasons


def _entries(source: Path) -> tuple[Path, list[tuple[str, str, int | None]]]:
    """Return the folder of the downloads, and ``(file id, file name, bytes)`` of each file."""
    if source.is_file():
        return source.parent, _read_manifest(source)
    if not source.is_dir():
        raise SampleSheetError(f"there is no GDC manifest, and no folder of its downloads, at {source}")
    manifests = sorted(
        {*source.glob("gdc_manifest*.txt"), *source.glob("gdc_manifest*.tsv"), *source.glob("MANIFEST.txt")}
    )
    if len(manifests) > 1:
        names = ", ".join(file.name for file in manifests[:5])
        raise SampleSheetError(f"{source} holds {len(manifests)} manifests ({names}): give one of them")
    if manifests:
        return source, _read_manifest(manifests[0])
    found: list[tuple[str, str, int | None]] = [
        (entry.name, file.name, None)
        for entry in sorted(source.iterdir())
        if entry.is_dir() and FILE_ID.fullmatch(entry.name)
        for file in sorted(entry.iterdir())
        if file.is_file() and file.suffix.lower() == SUFFIX
    ]
    if not found:
        raise SampleSheetError(
            f"{source} holds no gdc_manifest*.txt and no downloads (a folder for each file id); give the manifest"
        )
    return source, found


def _read_manifest(file: Path) -> list[tuple[str, str, int | None]]:
    try:
        if file.stat().st_size > MAX_MANIFEST_BYTES:
            raise SampleSheetError(
                f"{file} is no GDC manifest: it has more than {MAX_MANIFEST_BYTES >> 20} MB"
            )
        with file.open(encoding="utf-8-sig", newline="") as lines:
            reader = csv.DictReader(lines, delimiter="\t", strict=True)
            if not {"id", "filename"} <= set(reader.fieldnames or ()):
                raise SampleSheetError(
                    f"{file} is no GDC manifest: it has no columns id and filename, separated by tabs; download it from "
                    "the GDC's cart"
                )
            return [_entry(file, number, row) for number, row in enumerate(reader, start=2)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise SampleSheetError(
            f"{file} cannot be read as a GDC manifest: {error}; download it again"
        ) from error


def _entry(file: Path, line: int, row: dict[str, str | None]) -> tuple[str, str, int | None]:
    file_id, name, size = (str(row.get(column) or "").strip() for column in _COLUMNS)
    # A name is joined to a path below, so it must not lead out of the folder.
    if not FILE_ID.fullmatch(file_id) or not name or Path(name).name != name or name in (".", ".."):
        raise SampleSheetError(
            f"{file}, line {line}: {file_id[:40]!r} and {name[:60]!r} are no file id and file name"
        )
    return file_id, name, int(size) if size.isascii() and size.isdigit() and len(size) < 16 else None


def _nothing(source: Path, folder: Path, patients: int, absent: list[str], others: Counter[str]) -> str:
    if absent:
        fetch = (
            f"gdc-client download -m {source.name} -d {folder}"
            if source.is_file()
            else "gdc-client download -m MANIFEST"
        )
        return (
            f"{source} names diagnostic slides of {patients} patients, and none is there ({absent[0]}); fetch them with: "
            f"{fetch}"
        )
    there = ", ".join(f"{count} {what}" for what, count in others.items())
    return f"{source} names no diagnostic slide of TCGA (DX): {there or 'it is empty'}"
