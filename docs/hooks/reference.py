"""Pages of the site that are made from the code: the commands, the Python interface, the extensions, the notebooks.

mkdocs calls `on_files`; what is made here stands in no folder, so it cannot be out of date.
"""

import ast
import base64
import json
import re
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import typer.main
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

CONSTANT = "!^[A-Z][A-Z0-9_]*$"
"""Filter of mkdocstrings: upper-case names are settings of the implementation, which nobody calls."""


@dataclass(frozen=True)
class ApiPage:
    """What the reference of one package shows.

    Parameters
    ----------
    purpose
        One sentence, below the title.
    first
        Exported names in the order of use. Other exported names follow, so a new one cannot be forgotten.
    modules
        Further modules, below the package's name.
    """

    purpose: str
    first: tuple[str, ...]
    modules: tuple[str, ...]


PACKAGES = {
    "featurestore": ApiPage(
        "Slides in, chunked embeddings out.",
        (
            "embed",
            "EmbedSettings",
            "GridSpec",
            "TokenGridSpec",
            "open_store",
            "open_slide",
            "read_samples",
            "catalogue",
            "validate",
        ),
        (
            "slides.protocol",
            "slides.slide_reader",
            "slides.sample_sheet",
            "encoders.protocol",
            "encoders.tokens",
            "tissue.tissue_method",
            "storage.store",
            "storage.removal",
            "analysis.patch_stream",
            "analysis.summary",
            "analysis.pca",
            "analysis.kmeans",
            "analysis.neighbours",
            "grid",
            "embedding.slide_result.SlideResult",
            "events",
            "extensions",
            "errors",
        ),
    ),
    "histosge": ApiPage(
        "Embeddings in, expression out.",
        (
            "train",
            "TrainSettings",
            "Selection",
            "predict",
            "PredictSettings",
            "evaluate",
            "EvaluateSettings",
            "load_model",
            "export",
            "Loader",
            "LoadSettings",
            "SpotTargets",
            "stream_batches",
            "find_expression",
            "SlideFrame",
            "Spots",
            "read_gene_list",
        ),
        (
            "data.section_loading",
            "data.sections",
            "data.expression.find_expression",
            "data.expression.expression_layout",
            "models.protocol",
            "models.registry",
            "training.saved_model",
            "training.model_card",
            "prediction.predict",
            "prediction.slide_prediction.PredictResult",
            "prediction.expression_store",
            "prediction.stored_map",
            "heldout.splits",
            "heldout.metrics",
            "heldout.metric_registry",
            "evaluation.evaluate",
            "evaluation.results",
            "exporting.export",
            "exporting.export_format",
            "exporting.figure",
            "exporting.cell_table",
            "analysis.cohort_maps",
            "analysis.gene_sets",
            "analysis.signatures",
            "analysis.pseudobulk",
            "analysis.variable_genes",
            "demo",
            "errors",
        ),
    ),
}

REGISTRIES = {
    "Encoders": "featurestore.encoders.loading.ENCODERS",
    "Slide readers": "featurestore.slides.slide_reader.READERS",
    "Tissue methods": "featurestore.tissue.tissue_method.TISSUE_METHODS",
    "Expression layouts": "histosge.data.expression.expression_layout.LAYOUTS",
    "Models": "histosge.models.registry.MODELS",
    "Exports": "histosge.exporting.export_format.FORMATS",
    "Metrics": "histosge.heldout.metric_registry.METRICS",
}
"""Title of each table of the extensions, and the registry that it is made from."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the made pages."""
    pages = {"reference/cli.md": cli_page(), "reference/extensions.md": extensions_page()}
    for package, page in PACKAGES.items():
        pages[f"reference/{package}.md"] = api_page(package, page)
    pictures: dict[str, bytes] = {}
    for notebook in sorted(Path(config.docs_dir, "notebooks").glob("*.ipynb")):
        text, drawn = notebook_page(notebook)
        pages[f"reference/{notebook.stem}.md"] = text
        pictures |= {f"reference/{name}": content for name, content in drawn.items()}
    for path, content in (pages | pictures).items():
        files.append(File.generated(config, path, content=content))
    return files


def api_page(package: str, page: ApiPage) -> str:
    """Return a page that mkdocstrings fills from the docstrings: what a user calls comes first."""
    homes = exported(package)
    names = [name for name in page.first if name in homes] + sorted(homes.keys() - set(page.first))
    parts = [f"# {package}", page.purpose, "## Exported functions and classes"]
    parts.append("\n".join(f"- [`{package}.{name}`][{homes[name]}.{name}]" for name in names))
    for name in names:
        title = f"{package}.{name}"
        parts.append(
            _directive(f"{homes[name]}.{name}", {"heading_level": 3, "heading": title, "toc_label": name})
        )
    parts.append("## Further modules")
    for module in page.modules:
        path = f"{package}.{module}"
        shown = [name for name in names if homes[name] == path]
        filters = ["!^_", CONSTANT, *(f"!^{name}$" for name in shown)]
        parts.append(_directive(path, {"heading_level": 3, "filters": filters}))
    return "\n\n".join(parts) + "\n"


def exported(package: str) -> dict[str, str]:
    """Return the names that a package exports, and the modules that define them.

    They are read from the source: importing every module for its names would load torch.
    """
    spec = find_spec(package)
    tree = ast.parse(Path(str(spec and spec.origin)).read_text())
    return {
        alias.asname: node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module is not None
        for alias in node.names
        if alias.asname is not None
    }


def _directive(path: str, options: dict[str, Any]) -> str:
    lines = [f"        {name}: {json.dumps(value)}" for name, value in options.items()]
    return "\n".join([f"::: {path}", "    options:", *lines])


def extensions_page() -> str:
    """Return one table per kind of extension: the names that histosge itself registers."""
    parts = [
        "# Encoders, models, formats",
        "These names are part of histosge. Other packages can add to each table: [Extensions](../extending.md).",
    ]
    for title, path in REGISTRIES.items():
        module, _, name = path.rpartition(".")
        registry = getattr(import_module(module), name)
        rows = ["| name | |", "|---|---|"]
        # Not those of installed packages: the page must not depend on the machine that builds it.
        rows += [
            f"| `{record.name}` | {_cell(record.help.rstrip('.'))} |" for record in registry.own.values()
        ]
        parts += [f"## {title}", f"Entry-point group: `{registry.group}`.", "\n".join(rows)]
    return "\n\n".join(parts) + "\n"


def notebook_page(path: Path) -> tuple[str, dict[str, bytes]]:
    """Return a notebook's cells with their outputs as a page, and the pictures beside it by name."""
    parts: list[str] = []
    pictures: dict[str, bytes] = {}
    for number, cell in enumerate(json.loads(path.read_text())["cells"]):
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if "image/png" in data:
                name = f"{path.stem}-{number:02d}.png"
                pictures[name] = base64.b64decode(data["image/png"])
                parts.append(f"![What the cell above draws]({name})")
            else:
                shown = "".join(output.get("text", data.get("text/plain", "")))
                parts.append(f"```text\n{shown.rstrip()}\n```")
    parts.append(f"*This page is `docs/notebooks/{path.name}` with the outputs of a run.*")
    return "\n\n".join(parts) + "\n", pictures


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
