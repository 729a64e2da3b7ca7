"""Parts of a page beyond the scores: what an ablation found, and what the HEST-Benchmark's protocol found."""

from collections.abc import Sequence

from histosge.protocol_hest import HEST, METRICS, QUIRKS, HestResult
from histosge.report import Block, Table
from histosge.scores import Ablation

ABLATION_COLUMNS = {
    "pearson_mean": "held-out Pearson",
    "paper_all_spots": "paper_all_spots",
    "paper_all_spots_on_noise": "paper_all_spots on noise",
    "as_reported": "as reported",
}


def ablation_block(found: Ablation) -> Block:
    """Return the table of an ablation, with what the columns are worth."""
    rows = tuple(
        (variant, *(f"{found.mean(variant, metric):z.3f}" for metric in ABLATION_COLUMNS))
        for variant in found.variants
    )
    text = (
        "Each defect of the released code switched on alone, then all of them. Only the first column is held out."
        " paper_all_spots counts training spots; beside it stands what it gives on random embeddings, where there"
        " is nothing to know. As reported: what a run with these switches would print."
    )
    points = tuple(f"Left out: {reason}" for reason in found.left_out)
    caption = f"Mean over folds and seeds, split {found.split}."
    table = Table(("variant", *ABLATION_COLUMNS.values()), rows, caption)
    return Block("Ablation of the published model", text, tables=(table,), points=points)


def hest_blocks(found: HestResult, notes: Sequence[str] = ()) -> list[Block]:
    """Return the page of the HEST-Benchmark's protocol."""
    header = ("", "Pearson, as the benchmark", "Pearson, depth-normalised", "genes without one")
    rows = tuple(
        (label, *(f"{found.values(preset, metric).mean():z.3f}" for metric in METRICS))
        for preset, label in ((HEST, "embeddings"), ("hest_noise", "noise"))
    )
    table = Table(
        header, rows, f"Held-out {found.split}s, mean over folds (noise: and draws).", frozenset({"noise"})
    )
    return [
        Block("Scores on held-out spots", tables=(table,)),
        Block("Quirks of this protocol, and caveats", points=(*QUIRKS, *notes)),
    ]
