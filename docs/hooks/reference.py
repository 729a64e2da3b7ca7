"""Pages of the site that are made from the code: the commands, the Python interface, the notebooks.

mkdocs calls `on_files`; what is made here stands in no folder, so it cannot be out of date.
"""

import json
import re
from pathlib import Path
from typing import Any

import typer.main
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

PACKAGES = {
    "featurestore": (
        "Slides in, chunked embeddings out.",
        [
            "embedding.embed",
            "embedding.plan",
            "grid",
            "slides.open_slide",
            "encoders.protocol",
            "storage.store",
            "storage.tree",
            "storage.catalogue",
            "storage.validation",
            "storage.removal",
            "slides.sample_sheet",
            "errors",
        ],
    ),
    "histosge": (
        "Embeddings in, expression out.",
        [
            "training.train",
            "prediction.predict",
            "evaluation.evaluate",
            "training.saved_model",
            "prediction.expression_store",
            "data.expression",
            "heldout.splits",
            "heldout.metrics",
            "evaluation.results",
            "demo",
            "errors",
        ],
    ),
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the made pages."""
    pages = {"reference/cli.md": cli_page()}
    for package, (purpose, modules) in PACKAGES.items():
        pages[f"reference/{package}.md"] = api_page(package, purpose, modules)
    for notebook in sorted(Path(config.docs_dir, "notebooks").glob("*.ipynb")):
        pages[f"reference/{notebook.stem}.md"] = notebook_page(notebook)
    for path, text in pages.items():
        files.append(File.generated(config, path, content=text))
    return files


def api_page(package: str, purpose: str, modules: list[str]) -> str:
    """Return a page that mkdocstrings fills from the docstrings."""
    blocks = "\n\n".join(f"::: {package}.{module}" for module in modules)
    return f"# {package}\n\n{purpose}\n\n{blocks}\n"


def notebook_page(path: Path) -> str:
    """Return a notebook's cells as a page."""
    parts = []
    for cell in json.loads(path.read_text())["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
    return "\n\n".join([*parts, f"*This page is `docs/notebooks/{path.name}`, without its outputs.*"]) + "\n"


def cli_page() -> str:
    """Return every command with its arguments, options and defaults."""
    from histosge_cli.main import app

    root = typer.main.get_command(app)
    intro = _plain(root.help or "")
    return "\n".join(["# Command line", "", intro, "", *_group(root, "histosge")]) + "\n"


def _group(group: Any, path: str) -> list[str]:
    lines: list[str] = []
    for name, command in group.commands.items():
        if command.hidden:
            continue
        if hasattr(command, "commands"):
            arguments = " ".join(_metavar(p) for p in command.params if _is_argument(p))
            lines += [f"## {path} {name}", "", _plain(command.help or ""), ""]
            lines += _group(command, f"{path} {name} {arguments}".rstrip())
        else:
            lines += _command(command, f"{path} {name}")
    return lines


def _command(command: Any, path: str) -> list[str]:
    arguments = [p for p in command.params if _is_argument(p)]
    options = [p for p in command.params if not _is_argument(p) and not p.hidden]
    usage = " ".join([path, *map(_metavar, arguments), *(["[OPTIONS]"] if options else [])])
    lines = [f"## {path}", "", f"`{usage}`", "", _plain(command.help or ""), ""]
    if arguments or options:
        lines += ["| | |", "|---|---|"]
        lines += [f"| `{_metavar(p)}` | {_cell(p.help)} |" for p in arguments]
        lines += [f"| `{_flags(p)}` | {_cell(p.help)}{_default(p)} |" for p in options]
    return [*lines, ""]


def _is_argument(parameter: Any) -> bool:
    return str(parameter.param_type_name) == "argument"


def _metavar(parameter: Any) -> str:
    name = parameter.metavar or parameter.name.upper()
    return name if parameter.required else f"[{name}]"


def _flags(parameter: Any) -> str:
    flags = ", ".join(parameter.opts)
    if parameter.is_flag:
        return flags
    kind = parameter.metavar or _type(parameter)
    return f"{flags} {kind}" + (" ..." if parameter.multiple else "")


def _type(parameter: Any) -> str:
    kind = parameter.type_descriptor.annotation if hasattr(parameter, "type_descriptor") else parameter.type
    return str(getattr(kind, "__name__", kind)).upper().replace("STR", "TEXT")


def _default(parameter: Any) -> str:
    value = parameter.default
    if not parameter.is_flag and isinstance(value, str | int | float | Path):
        return f" Default: `{value}`."
    return ""


def _cell(text: str | None) -> str:
    return (text or "").replace("|", "\\|").replace("\n\n", "<br>")


def _plain(text: str) -> str:
    """Return help as Markdown: an example becomes code, and so does what stands as it is."""
    text = re.sub(r"\x08\n((?: {2,}.*\n)+)", r"```shell\n\1```\n", text)
    text = re.sub(r"^  histosge", "histosge", text, flags=re.MULTILINE)
    return re.sub(r"Example: (.+)", r"Example: `\1`", text.strip())
