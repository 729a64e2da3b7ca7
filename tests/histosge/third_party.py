"""A tiny package of somebody else's, as pip would leave it: one module and one entry point."""

from pathlib import Path


def install(site: Path, kind: str, name: str, source: str) -> None:
    """Write module ``their_<name>`` and the entry point `name` of ``histosge.<kind>`` that names its `RECORD`."""
    module = f"their_{name.replace('-', '_')}"
    (site / f"{module}.py").write_text(source)
    info = site / f"{module}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[histosge.{kind}]\n{name} = {module}:RECORD\n")
