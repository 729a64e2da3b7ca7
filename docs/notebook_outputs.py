"""Run the notebooks and keep their outputs.

    python docs/notebook_outputs.py

Each notebook in docs/notebooks runs from top to bottom in an empty folder, and is written back with what its cells print
and draw: text and small pictures of synthetic sections, without versions, times and places of the machine. It takes two
minutes on two cores, and needs the extra dev.
"""

import asyncio
import base64
import io
import json
import os
import re
import socket
import sys
import tempfile
from pathlib import Path
from typing import Any

import nbformat
from jupyter_client.kernelspec import KernelSpecManager
from nbclient import NotebookClient
from PIL import Image

NOTEBOOKS = Path(__file__).parent / "notebooks"
# Of a picture: a few times what a plot takes, far below what a repository notices.
MOST_BYTES = 100_000
KEPT_KINDS = ("image/png", "text/html", "text/plain")


def main() -> None:
    """Run all notebooks and write them back."""
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        with tempfile.TemporaryDirectory() as folder:
            ran = run(path, Path(folder))
            text = json.dumps(tidy(path, ran), indent=1, ensure_ascii=False) + "\n"
        for name in (folder, str(NOTEBOOKS.parents[1]), str(Path.home()), socket.gethostname()):
            if re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text):
                raise SystemExit(
                    f"{path}: an output names {name!r}, which is of this machine; print something else"
                )
        path.write_text(text)
        print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


def run(path: Path, folder: Path) -> Any:
    """Return a notebook with the outputs of a run in `folder`.

    Raises
    ------
    nbclient.exceptions.CellExecutionError
        If a cell fails.
    """
    # A kernel of this very interpreter, whatever kernels the user has registered.
    spec = folder / ".kernels" / "here"
    spec.mkdir(parents=True)
    words = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    # The kernel imports what this process imports, also where the package is not installed.
    env = {"PYTHONPATH": os.pathsep.join(place for place in sys.path if place), "MPLBACKEND": ""}
    written = {"argv": words, "display_name": "here", "language": "python", "env": env}
    (spec / "kernel.json").write_text(json.dumps(written))
    client = NotebookClient(
        nbformat.read(path, as_version=4),
        timeout=300,
        kernel_name="here",
        record_timing=False,
        resources={"metadata": {"path": str(folder)}},
    )
    client.create_kernel_manager()
    client.km.kernel_spec_manager = KernelSpecManager(kernel_dirs=[str(spec.parent)])
    return asyncio.run(client.async_execute())


def tidy(path: Path, ran: Any) -> dict[str, Any]:
    """Return a notebook's file with the outputs of its run, without what differs from machine to machine."""
    kept: dict[str, Any] = json.loads(path.read_text())
    for cell, done in zip(kept["cells"], ran["cells"], strict=True):
        if cell["cell_type"] == "code":
            cell["execution_count"] = done["execution_count"]
            # Warnings and progress go to standard error: they are of a version or of a machine.
            cell["outputs"] = [_tidy(output) for output in done["outputs"] if output.get("name") != "stderr"]
    return kept


def _tidy(output: Any) -> dict[str, Any]:
    if output["output_type"] == "stream":
        return {"name": "stdout", "output_type": "stream", "text": _lines(output["text"])}
    data = {kind: output["data"][kind] for kind in KEPT_KINDS if kind in output["data"]}
    if "image/png" in data:
        # What a plot prints beside itself is a number of its objects.
        data = {"image/png": _small(data["image/png"])}
    shown = {kind: value if kind == "image/png" else _lines(value) for kind, value in data.items()}
    count = {"execution_count": output["execution_count"]} if "execution_count" in output else {}
    return {"data": shown, **count, "metadata": {}, "output_type": output["output_type"]}


def _lines(text: str) -> list[str]:
    return text.splitlines(keepends=True)


def _small(encoded: str) -> str:
    """Return a PNG of 64 colours, which maps and text do not show."""
    with Image.open(io.BytesIO(base64.b64decode(encoded))) as picture:
        few = picture.convert("RGB").quantize(64, method=Image.Quantize.MEDIANCUT, kmeans=4)
    target = io.BytesIO()
    few.save(target, "PNG", optimize=True)
    if target.tell() > MOST_BYTES:
        raise SystemExit(f"a picture has {target.tell()} bytes; draw it smaller, {MOST_BYTES} are kept")
    return base64.b64encode(target.getvalue()).decode("ascii")


if __name__ == "__main__":
    main()
