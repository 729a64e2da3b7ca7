"""The scores in README.md and docs/: run what they come from, keep one record, and write the pages from the record.

python benchmarks/results.py [--parts demo,sections,ideas,...] [--take FILE] [--render] [--quick] [--json FILE]

Runs the parts (all without --parts) on this working tree, stores what they give in benchmarks/results.json with
commit, date, machine and command, and writes the blocks between ``<!-- results:NAME -->`` and ``<!-- /results -->`` of
the pages anew. --take FILE stores the JSON of another benchmark: its figures that have a target stand in the table of
targets, and those of `gpu.py`, from a machine with a GPU, in a table of their own. --render writes the pages from the
record alone. --quick runs the demo's slide at a quarter of its size and writes nothing.

Parts
    demo      `histosge demo`: one synthetic slide with known truth; about 2 minutes
    sections  the three public sections ($HISTOSGE_DATA), two encoders, mean, depth, ridge and dense; about 6 minutes
    tokens    `python benchmarks/tokens.py`: positions per second of tokens and of overlapping patches
    tokens_accuracy  the same command's held-out scores; ten minutes, most of them for the overlapping patches
    ideas     `python benchmarks/ideas.py`: what each part of `dense` gives, on every encoder at hand
    codings   `python benchmarks/storage.py --part codings`: bytes, speed and accuracy of `embed --store-as`
    pipeline  part of `python benchmarks/embedding.py`: the pipeline without a network beside bare decoding; 3 minutes
    donors    `python benchmarks/donors.py`: every preset on synthetic donors that training has not seen; about 20 minutes
    stains    `python benchmarks/donors.py --stains`: the first two cohorts with and without stain normalisation
    trust     `python benchmarks/calibration.py`: smooth fields called trusted, coverage of intervals; about 5 minutes
    paper     the published network on the same sections and `morphology`; the longest; its rows are left out until it
              has run
"""

import argparse
import datetime as dt
import json
import re
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import calibration
import donors
import embedding
import ideas
import polars as pl
import tokens
from _codings import CODINGS, codings
from _common import Result, commit, machine, report
from _public import SPEC, public_sheet

from featurestore.embedding.embed import EmbedSettings, embed
from histosge.demo import run_demo
from histosge.evaluation.evaluate import EvaluateSettings, evaluate
from histosge.evaluation.results import CONTROLS, NOISE, SMOOTH_NOISE, Scores
from histosge.synthetic import SyntheticSpec

ROOT = Path(__file__).parents[1]
RECORD = ROOT / "benchmarks" / "results.json"
PAGES = ("README.md", "docs/results.md", "docs/morphology.md")
ENCODERS = ("morphology", "colour")
METRICS = ("pearson_mean", "pearson_depth_adjusted", "mse")
GENES, SEEDS = 250, 3
STAIN_SEEDS = donors.SEEDS[:2]
"""Each is three times the work of another cohort."""

Values = dict[str, float]
Record = Mapping[str, Mapping[str, Any]]


def main() -> None:
    """Run parts, and write record and pages."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", default=",".join(PARTS), help="which, separated by commas")
    parser.add_argument("--render", action="store_true", help="write the pages from the record; run nothing")
    parser.add_argument("--quick", action="store_true", help="a small demo; write neither record nor pages")
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write the figures of this run here")
    parser.add_argument(
        "--take",
        metavar="FILE",
        type=Path,
        nargs="+",
        default=[],
        help="store JSON of benchmarks; run nothing",
    )
    given = parser.parse_args()
    record = json.loads(RECORD.read_text()) if RECORD.is_file() else {}
    for path in given.take:
        name, part = taken(json.loads(path.read_text()))
        record[name] = part
        RECORD.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")
    if given.render or given.take:
        write_pages(record)
        return
    names = ["demo"] if given.quick else given.parts.split(",")
    results = []
    for name in names:
        # One folder a part: a store of the sections is 20 MB.
        with tempfile.TemporaryDirectory() as folder:
            values = PARTS[name](Path(folder), given.quick)
        results += [Result(f"{name}: {what}", value) for what, value in values.items()]
        # Read again: parts may run side by side.
        record = json.loads(RECORD.read_text()) if RECORD.is_file() else {}
        record[name] = {
            "command": f"python benchmarks/results.py --parts {name}",
            "commit": commit(),
            "date": dt.datetime.now(dt.UTC).date().isoformat(),
            "machine": machine(),
            "values": {what: round(value, 6) for what, value in values.items()},
        }
        # After each part: a run of all takes most of an hour.
        if not given.quick:
            RECORD.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")
    report("results", results, given)
    if not given.quick:
        write_pages(record)


# ---------------------------------------------------------------- what is run


def run_the_demo(folder: Path, quick: bool) -> Values:
    """Run `histosge demo`: held-out scores by preset and, of `dense`, by gene family; the map against the truth."""
    spec = SyntheticSpec(size_px=(4400, 4200)) if quick else None
    found = run_demo(folder / "demo", spec)
    values = {f"held out, {preset}": value for preset, value in found.held_out.items()}
    values |= {f"truth, {family}": value for family, value in found.truth.items()}
    genes = pl.read_csv(found.paths["report"].parent / "genes.csv").filter(pl.col("preset") == "dense")
    # Families are known by their genes' names: GRAD01, MORPH01 ...
    gradients = genes.filter(pl.col("gene").str.starts_with("GRAD"))["pearson"].mean()
    return values | {"held out, dense, gradient": float(str(gradients))}


def run_the_sections(folder: Path, quick: bool) -> Values:
    """Score the fast presets on the public sections with both encoders."""
    scores = _evaluate_public(folder, ENCODERS, ("mean", "depth", "ridge", "dense"))
    return _values(scores)


def run_the_ideas(folder: Path, quick: bool) -> Values:
    """Score the variants of `dense` on the public sections, for every encoder at hand."""
    every = ideas.load(folder, quick=quick)
    return {result.what: result.value for result in ideas.measure(every, quick=quick)}


def run_the_donors(folder: Path, quick: bool) -> Values:
    """Score every preset on synthetic donors that training has not seen."""
    return {result.what: result.value for result in donors.measure(folder, donors.SEEDS, quick=quick)}


def run_the_stains(folder: Path, quick: bool) -> Values:
    """Score ridge and `dense` on synthetic donors with and without stain normalisation."""
    return {result.what: result.value for result in donors.measure_stains(folder, STAIN_SEEDS, quick=quick)}


def run_the_trust(folder: Path, quick: bool) -> Values:
    """Measure how often smooth fields are called trusted, and what intervals cover."""
    return {result.what: result.value for result in calibration.measure(quick=quick)}


def run_the_tokens(folder: Path, quick: bool) -> Values:
    """Time a grid of tokens beside overlapping patches."""
    return {result.what: result.value for result in tokens.speedups(folder, quick=quick)}


def run_the_token_accuracy(folder: Path, quick: bool) -> Values:
    """Score a grid of tokens beside overlapping patches, on the public sections."""
    return {result.what: result.value for result in tokens.accuracy(folder, quick=quick)}


def run_the_paper(folder: Path, quick: bool) -> Values:
    """Score the published network on the public sections."""
    return _values(_evaluate_public(folder, ENCODERS[:1], ("paper",)))


def run_the_codings(folder: Path, quick: bool) -> Values:
    """Write the public sections' store in each coding, and score `dense` on it."""
    return {result.what: result.value for result in codings(folder, quick=quick)}


def run_the_pipeline(folder: Path, quick: bool) -> Values:
    """Embed a 16k x 16k slide without a network, and decode its tiles."""
    results = embedding.share_of_decoding(folder, 2 if quick else 4, 3)
    return {result.what: result.value for result in results if result.value is not None}


def taken(document: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return the name and the part of a record that the JSON of another benchmark is."""
    # The first word is the benchmark's file, what follows says on what it ran.
    name, _, about = str(document["benchmark"]).partition(" ")
    if name in PARTS or not (ROOT / "benchmarks" / f"{name}.py").is_file():
        raise SystemExit(
            f"--take needs the JSON of a benchmark that is no part of its own; this is of {name!r}"
        )
    if (name, about) == ("gpu", "(cpu)"):
        raise SystemExit("gpu.py found no GPU where this JSON was written; only figures of one are shown")
    figures = [one for one in document["results"] if one["value"] is not None]
    return name, {
        "command": f"python benchmarks/{name}.py{' --quick' if document['quick'] else ''}",
        # A machine with a GPU may have no git.
        "commit": document["commit"] or commit(),
        "date": document["date"][:10],
        "machine": f"{about.strip('()')}, {document['machine']}" if name == "gpu" else document["machine"],
        "values": {one["what"]: round(one["value"], 6) for one in figures},
        "units": {one["what"]: one["unit"] for one in figures if one["target"]},
        "targets": {one["what"]: one["target"] for one in figures if one["target"]},
    }


def _evaluate_public(folder: Path, encoders: tuple[str, ...], presets: tuple[str, ...]) -> Scores:
    sheet = public_sheet()
    if sheet is None:
        raise SystemExit("the public sections are absent: name their folder in HISTOSGE_DATA")
    embed(str(sheet), f"{folder}/store", EmbedSettings(encoders=encoders, spec=SPEC))
    settings = EvaluateSettings(split="section", presets=presets, genes=GENES, seeds=SEEDS, encoders=encoders)
    return evaluate(sheet, f"{folder}/store", folder / "report", settings)


def _values(scores: Scores) -> Values:
    found: Values = {}
    single = scores.encoders[0]
    for name in (*scores.presets, *scores.controls):
        # The control of all encoders together has no encoder in its name.
        label = name if scores.entries or name in CONTROLS else f"{name} on {single}"
        for metric in METRICS:
            found[f"{label}, {metric}"] = scores.mean(name, metric)
        spread = scores.values(name, "pearson_mean")
        found[f"{label}, sd"] = float(spread.std(ddof=1)) if len(spread) > 1 else 0.0
        if name not in CONTROLS:
            for fold in sorted({count.name for count in scores.folds}):
                found[f"{label}, fold {fold}"] = float(scores.values(name, "pearson_mean", fold).mean())
    return found


PARTS: dict[str, Callable[[Path, bool], Values]] = {
    "demo": run_the_demo,
    "sections": run_the_sections,
    "ideas": run_the_ideas,
    "tokens": run_the_tokens,
    "tokens_accuracy": run_the_token_accuracy,
    "codings": run_the_codings,
    "pipeline": run_the_pipeline,
    "donors": run_the_donors,
    "stains": run_the_stains,
    "trust": run_the_trust,
    "paper": run_the_paper,
}


# ---------------------------------------------------------------- what is written


def demo_block(record: Record) -> str:
    """The demo's scores."""
    value = record["demo"]["values"]
    held_out = ", ".join(
        f"`{preset}` {value[f'held out, {preset}']:.3f}" for preset in ("dense", "ridge", "knn")
    )
    on_blocks = value["held out, dense, gradient"]
    gradients = f"on the slide that was trained on; {on_blocks:.2f} on held-out blocks"
    rows = [
        "| gene family | Pearson | |",
        "|---|---|---|",
        f"| tied to morphology | {value['truth, morphology']:.2f} | |",
        f"| slow gradients that the image does not show | {value['truth, gradient']:.2f} | {gradients} |",
        f"| noise | {value['truth, noise']:z.3f} | must be 0 |",
        "",
        f"Held-out blocks of spots, all 60 genes: {held_out}, noise {value['held out, noise']:z.3f}.",
        "",
        _source(record, "demo"),
    ]
    return "\n".join(rows)


def sections_block(record: Record) -> str:
    """The three sections, `morphology` and `colour`."""
    value = record["sections"]["values"] | (record["paper"]["values"] if "paper" in record else {})
    rows = [
        ("`dense`", "dense", False),
        ("`depth` (oracle: uses the measured library sizes of the held-out spots)", "depth", False),
        ("`ridge`", "ridge", False),
        ("`paper`, 100 epochs", "paper", True),
    ]
    lines = [
        "| `morphology`, 164 numbers | Pearson | C2 / C3 / C4 | depth-adjusted | MSE |",
        "|---|---|---|---|---|",
    ]
    for title, preset, has_spread in rows:
        name = f"{preset} on morphology"
        if f"{name}, pearson_mean" not in value:
            continue
        folds = " / ".join(f"{value[f'{name}, fold {fold}']:.3f}".lstrip("0") for fold in ("C2", "C3", "C4"))
        pearson = f"{value[f'{name}, pearson_mean']:.3f}" + (
            f" ± {value[f'{name}, sd']:.3f}" if has_spread else ""
        )
        lines.append(
            f"| {title} | {pearson} | {folds} | {value[f'{name}, pearson_depth_adjusted']:z.3f} "
            f"| {value[f'{name}, mse']:.3f} |"
        )
    lines.append(f"| `mean` | 0 | | 0 | {value['mean on morphology, mse']:.3f} |")
    lines.append(
        f"| noise control (`ridge` on random embeddings, 20 draws, both encoders) | {value['noise, pearson_mean']:z.3f} ± "
        f"{value['noise, sd']:.3f} | | {value['noise, pearson_depth_adjusted']:z.3f} | {value['noise, mse']:.3f} |"
    )
    # Records of before this control have no such row.
    if f"{SMOOTH_NOISE}, pearson_mean" in value:
        pearson, sd, adjusted, mse = (
            value[f"{SMOOTH_NOISE}, {what}"]
            for what in ("pearson_mean", "sd", "pearson_depth_adjusted", "mse")
        )
        lines.append(
            f"| smooth-noise control (random embeddings that are smooth in space) | {pearson:z.3f} ± {sd:.3f} | | "
            f"{adjusted:z.3f} | {mse:.3f} |"
        )
    lines += ["", "| `colour`, 6 numbers | Pearson | depth-adjusted |", "|---|---|---|"]
    lines += [
        f"| `{preset}` | {value[f'{preset} on colour, pearson_mean']:.3f} | "
        f"{value[f'{preset} on colour, pearson_depth_adjusted']:.3f} |"
        for preset in ("dense", "ridge")
    ]
    sources = " ".join(_source(record, part) for part in ("sections", "paper") if part in record)
    return "\n".join([*lines, "", sources])


def readme_block(record: Record) -> str:
    """The same sections in a sentence."""
    value = record["sections"]["values"]
    dense, ridge = (value[f"{name} on morphology, pearson_mean"] for name in ("dense", "ridge"))
    adjusted = value["dense on morphology, pearson_depth_adjusted"]
    paper = ""
    if "paper" in record:
        found = record["paper"]["values"]["paper on morphology, pearson_mean"]
        paper = f"the published HisToSGE network {found:.3f}, "
    return (
        "Three public sections of one breast tumour, each held out in turn, 250 genes, mean Pearson correlation per gene: "
        f"`dense` {dense:.3f},\n`ridge` {ridge:.3f}, {paper}noise "
        f"{value['noise, pearson_mean']:z.3f}. A large part of each figure is sequencing depth: after depth is\n"
        f"regressed out, `dense` scores {adjusted:.3f}."
    )


def encoders_block(record: Record) -> str:
    """The same sections by encoder."""
    value = record["sections"]["values"]

    def row(title: str, encoder: str) -> str:
        dense, ridge = (value[f"{preset} on {encoder}, pearson_mean"] for preset in ("dense", "ridge"))
        return f"| {title} | {dense:.3f} | {ridge:.3f} | {value[f'ridge on {encoder}, pearson_depth_adjusted']:.3f} |"

    return "\n".join(
        [
            "| | `dense` | `ridge` | `ridge`, depth-adjusted |",
            "|---|---|---|---|",
            row("`morphology`, 164 numbers", "morphology"),
            row("`colour`, 6 numbers", "colour"),
            f"| random numbers | | {value['noise, pearson_mean']:z.3f} | {value['noise, pearson_depth_adjusted']:z.3f} |",
        ]
    )


def ideas_block(record: Record) -> str:
    """What each part of `dense` gives, by encoder."""
    value = record["ideas"]["values"]
    titles = {
        "colour": "`colour`, 6 numbers",
        "morphology": "`morphology`, 164 numbers",
        "random": "ResNet-18 with random weights, 512 numbers",
        "pretrained": "EfficientNet-Lite0 (ImageNet), 1,280 numbers",
    }
    encoders = [name for name in titles if f"{name}, dense: Pearson" in value]
    lines = [
        "| Pearson / depth-adjusted | " + " | ".join(titles[name] for name in encoders) + " |",
        "|---|" + "---|" * len(encoders),
    ]
    methods = [
        what.removeprefix(f"{encoders[0]}, ").removesuffix(": Pearson")
        for what in value
        if what.startswith(f"{encoders[0]}, ") and what.endswith(": Pearson")
    ]
    for method in sorted(methods, key=_IDEAS.index):
        cells = [
            f"{value[f'{name}, {method}: Pearson']:z.3f} / {value[f'{name}, {method}: after depth']:z.3f}"
            for name in encoders
        ]
        title = " ".join(f"`{word}`" if word in _QUOTED else word for word in method.split(" "))
        lines.append(f"| {title} | {' | '.join(cells)} |")
    for key, title in (("", ""), ("_seurat_v3", "`seurat_v3` ")):
        if f"gain_{encoders[0]}{key}" in value:
            gains = [f"{value[f'gain_{name}{key}']:+.3f}" for name in encoders]
            lines.append(f"| {title}`dense` - `ridge` | {' | '.join(gains)} |")
    if (both := "two encoders, dense: Pearson") in value:
        adjusted = value["two encoders, dense: after depth"]
        lines += [
            "",
            f"`dense` on the pretrained network and `morphology` averaged: {value[both]:z.3f} / {adjusted:z.3f}.",
        ]
    lines += [
        "",
        f"The least gain of `dense` over `ridge` on a section is {value['worst_fold']:+.3f}.",
        "",
        _source(record, "ideas"),
    ]
    return "\n".join(lines)


def codings_block(record: Record) -> str:
    """What each coding of embeddings takes, and what it loses."""
    value = record["codings"]["values"]
    lines = [
        "| `--store-as` | size | write MB/s | read MB/s | 1 - cosine, mean / largest | held-out Pearson of `dense` |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| `{name}` | {value[f'{name}: size']:.2f} | {value[f'{name}: write']:.0f} | {value[f'{name}: read']:.0f} | "
        f"{abs(value[f'{name}: 1 - cosine, mean']):.1g} / {abs(value[f'{name}: 1 - cosine, largest']):.1g} | "
        f"{value[f'{name}: held-out Pearson of dense']:.4f} |"
        for name in CODINGS
        if f"{name}: size" in value
    ]
    return "\n".join([*lines, "", _source(record, "codings")])


def trust_block(record: Record) -> str:
    """How often smooth fields, and genes tied to morphology, are called trusted; what intervals cover."""
    value = record["trust"]["values"]

    def table(title: str, columns: tuple[str, ...], rows: Mapping[str, str]) -> list[str]:
        """Make a table with a column for each part and preset; rows are title -> name with {part} and {preset}."""
        cells = [(part, preset) for part in columns for preset in calibration.PRESETS]
        lines = [
            f"| {title} | {' | '.join(f'{part}, `{preset}`' for part, preset in cells)} |",
            "|---|" + "---|" * len(cells),
        ]
        for label, name in rows.items():
            shares = [value[name.format(part=part, preset=preset)] for part, preset in cells]
            lines.append(f"| {label} | {' | '.join(f'{share:.1%}' for share in shares)} |")
        return lines

    lengths = {
        f"smooth fields, length {length:g} spots": f"length {length}: trusted"
        for length in calibration.LENGTHS
    }
    made = {label: f"fields, {{part}}, {{preset}}, {name}" for label, name in lengths.items()}
    tied = {"genes tied to morphology": "tied to morphology, {part}, {preset}: trusted"}
    lines = table("called trusted, synthetic cohort", ("1 section", "3 sections"), made | tied)
    if any(name.startswith("fields on") for name in value):
        public = {label: f"fields on {{part}}, {{preset}}, {name}" for label, name in lengths.items()}
        lines += ["", *table("on the spots and `morphology` embeddings of", ("C2", "C2-C4"), public)]
    public = []
    if "public, as chosen: coverage" in value:
        thirds = ("low", "middle", "high")
        chosen, one = (
            " / ".join(f"{value[f'public, {name}: {third} predicted depth']:.3f}" for third in thirds)
            for name in ("as chosen", "one width")
        )
        public = [
            (
                f"On C2-C4, each held out, they cover {value['public, as chosen: coverage']:.3f}; by thirds of predicted "
                f"depth, from the lowest, {chosen} (with one width per gene for all depths {one})."
            )
        ]
    # Records of before this was measured have no such figure.
    if "public: genes trusted, mean of folds" in value:
        share = value["public: genes trusted, mean of folds"]
        public.append(f"Of the 250 genes there, {share:.0%} are trusted, within donor C only.")
    lines += [
        "",
        (
            f"90 % intervals of `dense` cover {value['coverage_sections']:.3f} of the spots of synthetic sections that took "
            f"no part, and {value['coverage_donors']:.3f} with at least 9 donors in the training, by limits "
            "that are taken over donors."
        ),
        *public,
        "",
        _source(record, "trust"),
    ]
    return "\n".join(lines)


def tokens_block(record: Record) -> str:
    """Positions per second of tokens and of overlapping patches."""
    value = record["tokens"]["values"]
    lines = [
        "| network, K | tokens, positions/s | overlapping patches, positions/s | ratio | target | limit |",
        "|---|---|---|---|---|---|",
    ]
    for case in tokens.SPEEDS:
        name = f"{case.network.removeprefix('timm:')}, K = {case.k}"
        fine, overlap = value[f"{name}: tokens"], value[f"{name}: overlapping patches"]
        lines.append(
            f"| {name} | {fine:.1f} | {overlap:.2f} | {value[case.key]:.1f} | {case.target.removeprefix('>= ')} | "
            f"{case.k**2} |"
        )
    return "\n".join([*lines, "", _source(record, "tokens")])


def token_accuracy_block(record: Record) -> str:
    """Held-out scores of tokens and of overlapping patches, by grid."""
    value = record["tokens_accuracy"]["values"]
    lines = [
        "| Pearson / depth-adjusted | `ridge` | `dense` | `dense` - `dense` on overlapping patches |",
        "|---|---|---|---|",
    ]
    for number, label in enumerate(tokens.grids(quick=False)):
        cells = [
            f"{value[f'{label}, {model}: Pearson']:z.3f} / {value[f'{label}, {model}: after depth']:z.3f}"
            for model in tokens.MODELS
        ]
        key = "pearson_difference" if number == 1 else f"pearson_difference, {label}"
        gap = (
            ""
            if number == 0
            else f"{value[key]:+.3f} [{value[f'{key}, low']:+.3f}, {value[f'{key}, high']:+.3f}]"
        )
        lines.append(f"| {label} | {' | '.join(cells)} | {gap} |")
    gap = value["pearson_difference"]
    verdict = "within" if gap >= -0.01 else "beyond"
    lines += ["", f"Tokens alone lose {-gap:.3f}, {verdict} the target of 0.01.", ""]
    return "\n".join([*lines, _source(record, "tokens_accuracy")])


def donors_block(record: Record) -> str:
    """Every preset on donors that training has not seen."""
    value = record["donors"]["values"]
    encoders = [name for name in donors.ENCODERS if f"{name}, dense: Pearson" in value]
    lines = [
        "| Pearson / depth-adjusted | " + " | ".join(f"`{name}`" for name in encoders) + " |",
        "|---|" + "---|" * len(encoders),
    ]
    prefix, end = f"{encoders[0]}, ", ": Pearson"
    for what in value:
        if what.startswith(prefix) and what.endswith(end):
            preset = what.removeprefix(prefix).removesuffix(end)
            cells = [
                f"{value[f'{name}, {preset}: Pearson']:z.3f} / {value[f'{name}, {preset}: after depth']:z.3f}"
                for name in encoders
            ]
            lines.append(f"| `{preset}` | {' | '.join(cells)} |")
    gain = (
        f"`dense` - `ridge` after depth, mean over encoders: {value['gain_over_ridge']:+.3f} (target 0.03)."
    )
    return "\n".join([*lines, "", gain, "", _source(record, "donors")])


def stains_block(record: Record) -> str:
    """Donors that training has not seen, with and without stain normalisation."""
    value = record["stains"]["values"]
    columns = [(encoder, preset) for encoder in donors.ENCODERS for preset in ("ridge", "dense")]
    lines = [
        "| Pearson / depth-adjusted | " + " | ".join(f"`{one}` on `{on}`" for on, one in columns) + " |",
        "|---|" + "---|" * len(columns),
    ]
    for stain in ("none", *donors.STAINS):
        cells = [
            f"{value[f'{stain}, {encoder}, {preset}: Pearson']:z.3f} / "
            f"{value[f'{stain}, {encoder}, {preset}: after depth']:z.3f}"
            for encoder, preset in columns
        ]
        lines.append(f"| `--stain {stain}` | {' | '.join(cells)} |")
    noise = max(abs(score) for what, score in value.items() if f", {NOISE}: " in what)
    return "\n".join([*lines, "", f"Noise control: at most {noise:.3f} from 0. {_source(record, 'stains')}"])


_IDEAS = tuple(
    f"{prefix}{name}"
    for prefix in ideas.CHOICES
    for name in ("ridge", *(variant.name for variant in ideas.VARIANTS), NOISE)
)
"""Rows of that table, in its order."""
_QUOTED = ("ridge", "dense", "seurat_v3")


def pipeline_block(record: Record) -> str:
    """The pipeline without a network beside bare decoding, and where its time goes."""
    value = record["pipeline"]["values"]
    decoding = value["bare decoding of JPEG tiles"]
    rows = (
        ("bare decoding of the tiles", "bare decoding of JPEG tiles"),
        ("`embed`, no network: bytes in, zeros out", "embed, no network"),
        ("`embed`, no network, with an encoder's floats", "embed, preprocessing"),
        ("`embed --encoder colour`", "embed, colour"),
        ("`embed --encoder morphology`", "embed, morphology"),
    )
    lines = ["| | patches per CPU-second | share of decoding |", "|---|---|---|"]
    lines += [f"| {title} | {value[what]:,.0f} | {value[what] / decoding:.2f} |" for title, what in rows]
    parts = [
        f"{what.removeprefix('profile: ')} {share:.0f} %"
        for what, share in value.items()
        if what.startswith("profile: ")
    ]
    lines += [
        "",
        f"With an encoder's floats, the CPU time goes to: {', '.join(parts)}.",
        "",
        _source(record, "pipeline"),
    ]
    return "\n".join(lines)


def gpu_block(record: Record) -> str:
    """One row a network, as `gpu.py` measured it on another machine."""
    value = record["gpu"]["values"]
    networks = [what.split()[1] for what in value if what.startswith("share_of_bare_encoder ")]
    lines = [
        (
            "| network | end to end, patches/s | share of the bare encoder | share of the bf16 peak | slides an hour "
            "| cosine to the CPU |"
        ),
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| `{name}` | {value[f'{name}: end to end']:,.0f} | {value[f'share_of_bare_encoder {name}']:.2f} | "
        f"{value[f'share_of_bf16_peak {name}']:.2f} | {value[f'slides_per_hour {name}']:,.0f} | "
        f"{value[f'{name}: cosine to the CPU in fp32']:.5f} |"
        for name in networks
    ]
    return "\n".join([*lines, "", f"On {record['gpu']['machine']}. {_source(record, 'gpu')}"])


def attention_block(record: Record) -> str:
    """One row a truth, means over its seeds; a figure that an earlier record lacks is a dash."""
    value = record["attention"]["values"]

    def mean(truth: str, figure: str) -> str:
        each = [v for what, v in value.items() if re.fullmatch(rf"{truth}, seed \d+: {figure}", what)]
        return f"{sum(each) / len(each):.3f}" if each else "-"

    scores = ("dense", "attention", "one ridge on all scales", "dense with the places of nests")
    added = ("added at mixed nests", "added at nests apart", "added elsewhere")
    lines = [
        (
            "| truth | `dense` | `attention` | one ridge on all scales | `dense` with the places of nests "
            "| added at mixed nests | at nests apart | elsewhere |"
        ),
        "|---|---|---|---|---|---|---|---|",
    ]
    for truth, name in (("long", "long-range"), ("local", "local"), ("permuted", "permuted")):
        lines.append(f"| {name} | " + " | ".join(mean(truth, figure) for figure in (*scores, *added)) + " |")
    seeds = sorted({found[1] for what in value if (found := re.match(r"long, seed (\d+):", what))})
    return "\n".join([*lines, "", f"Seeds {', '.join(seeds)}. {_source(record, 'attention')}"])


def targets_block(record: Record) -> str:
    """Every figure with a target, of benchmarks whose JSON was taken."""
    names = [name for name, part in record.items() if name != "gpu" and part.get("targets")]
    lines = ["| benchmark | figure | measured | target | |", "|---|---|---|---|---|"]
    for name in sorted(names):
        part = record[name]
        for what, target in sorted(part["targets"].items()):
            result = Result(what, part["values"][what], part["units"][what], target)
            verdict = "met" if result.met else "**missed**"
            value = f"{result.value:.3g} {result.unit}".strip()
            lines.append(f"| `{name}` | {what} | {value} | {target} | {verdict} |")
    return "\n".join([*lines, "", *(f"- {_source(record, name)}" for name in sorted(names))])


def _source(record: Record, part: str) -> str:
    entry = record[part]
    return f"`{entry['command']}`, commit {entry['commit'][:7]}, {entry['date']}."


BLOCKS: dict[str, tuple[tuple[str, ...], Callable[[Record], str]]] = {
    "demo": (("demo",), demo_block),
    "sections": (("sections",), sections_block),
    "readme": (("sections",), readme_block),
    "encoders": (("sections",), encoders_block),
    "ideas": (("ideas",), ideas_block),
    "tokens": (("tokens",), tokens_block),
    "tokens_accuracy": (("tokens_accuracy",), token_accuracy_block),
    "codings": (("codings",), codings_block),
    "pipeline": (("pipeline",), pipeline_block),
    "gpu": (("gpu",), gpu_block),
    "donors": (("donors",), donors_block),
    "stains": (("stains",), stains_block),
    "trust": (("trust",), trust_block),
    "attention": (("attention",), attention_block),
    "targets": ((), targets_block),
}
"""Name of a block -> parts of the record that it is made of, and what writes it."""
_BLOCK = re.compile(r"(<!-- results:(\w+) -->\n).*?(\n<!-- /results -->)", re.DOTALL)


def rendered(text: str, record: Record) -> str:
    """Return a page with its blocks written from a record; a block with a part that was never run stays as it is."""

    def block(found: re.Match[str]) -> str:
        parts, write = BLOCKS[found[2]]
        # Empty lines around it: not every Markdown reader ends a comment at the end of its line.
        return (
            f"{found[1]}\n{write(record)}\n{found[3]}" if all(part in record for part in parts) else found[0]
        )

    return _BLOCK.sub(block, text)


def write_pages(record: Record) -> None:
    """Write the blocks of all pages."""
    for name in PAGES:
        page = ROOT / name
        page.write_text(rendered(page.read_text(), record))


if __name__ == "__main__":
    main()
