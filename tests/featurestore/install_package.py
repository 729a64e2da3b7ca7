"""Another package's extension, as pip would leave it in a folder on the path: modules and entry points."""

from pathlib import Path


def install(site: Path, package: str, points: str, **modules: str) -> None:
    """Write a package into `site`.

    Parameters
    ----------
    points
        The text of its ``entry_points.txt``.
    modules
        Name of a module = its source.
    """
    for name, source in modules.items():
        (site / f"{name}.py").write_text(source)
    info = site / f"{package.replace('-', '_')}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(points)
