"""Lengths as slide files and sample sheets write them, in microns."""

import re
import unicodedata

# After compatibility normalisation, which makes one letter of the two mu that keyboards and files have.
_MICRONS = {
    "pm": 1e-6,
    "nm": 1e-3,
    "μm": 1.0,
    "um": 1.0,
    "mm": 1e3,
    "cm": 1e4,
    "m": 1e6,
    "Å": 1e-4,
    "angstrom": 1e-4,
    "nanometer": 1e-3,
    "nanometre": 1e-3,
    "micron": 1.0,
    "microns": 1.0,
    "micrometer": 1.0,
    "micrometre": 1.0,
    "micrometers": 1.0,
    "micrometres": 1.0,
    "millimeter": 1e3,
    "millimetre": 1e3,
    "centimeter": 1e4,
    "centimetre": 1e4,
    "meter": 1e6,
    "metre": 1e6,
}
_NUMBER = re.compile(r"[+-]?(\d+([.,]\d*)?|[.,]\d+)([eE][+-]?\d+)?")


def unit_microns(unit: str) -> float | None:
    """Return the microns in a unit of length; None for what is none, such as a pixel."""
    name = unicodedata.normalize("NFKC", unit.strip())
    # Symbols are case-sensitive (a megametre is no millimetre), words are not.
    return _MICRONS.get(name) or (_MICRONS.get(name.lower()) if len(name) > 2 else None)


def parse_number(text: str) -> float | None:
    """Return a number, with a point or a comma before its decimals; None for what is none."""
    text = text.strip()
    return float(text.replace(",", ".")) if _NUMBER.fullmatch(text) else None


def microns(size: str | None, unit: str = "µm") -> float | None:
    """Return a length in microns; None if the number or its unit cannot be read, or it is not positive."""
    number, per_unit = parse_number(size or ""), unit_microns(unit)
    return number * per_unit if number and number > 0 and per_unit else None
