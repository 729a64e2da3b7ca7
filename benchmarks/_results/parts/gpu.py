"""Speed of networks on a GPU: the JSON of `gpu.py` from another machine."""

from _common import Result

from _results.part import Part, Record, Table, source

STEPS = ("reading the file", "decoding", "cutting", "copying to the device", "encoding", "writing")


def gpu_table(record: Record) -> str:
    """One row a network, as `gpu.py` measured it on another machine."""
    value = record["gpu"]["values"]
    networks = [what.split()[1] for what in value if what.startswith("share_of_bare_encoder ")]
    lines = [
        (
            "| network | bare encoder, patches/s | end to end, patches/s | share (target 0.9) | small slide, patches/s "
            "| share of the bf16 peak | slides an hour | cosine to the CPU |"
        ),
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in networks:
        (bare,) = (each for what, each in value.items() if what.startswith(f"{name}: bare encoder"))
        share = f"share_of_bare_encoder {name}"
        lines.append(
            f"| `{name}` | {bare:,.0f} | {value[f'{name}: end to end']:,.0f} | {value[share]:.2f}{_missed(record, share)} | "
            f"{value[f'{name}: end to end, small slide']:,.0f} | {value[f'share_of_bf16_peak {name}']:.2f} | "
            f"{value[f'slides_per_hour {name}']:,.0f} | {value[f'{name}: cosine to the CPU in fp32']:.5f} |"
        )
    steps = "share_of_preloaded_steps cuda"
    on_cpu, on_gpu = (
        next(each for what, each in value.items() if what.startswith("predict, ") and f", {device}:" in what)
        for device in ("cpu", "cuda")
    )
    training = (
        f"Training of `attention`: steps a second on streamed blocks over those on blocks read before {value[steps]:.2f}"
        f"{_missed(record, steps)} (target 0.8). Prediction of a `dense` map: {on_gpu:,.0f} patches/s with `--device cuda`, "
        f"{on_cpu:,.0f} on the CPU."
    )
    lines += [
        "",
        "Milliseconds of one thread, or of the card, per 1,000 patches:",
        "",
        "| network | " + " | ".join(STEPS) + " |",
        "|---|" + "---|" * len(STEPS),
        *(
            f"| `{name}` | " + " | ".join(f"{value[f'{name}: {step}']:,.0f}" for step in STEPS) + " |"
            for name in networks
        ),
        "",
        training,
        "",
        f"On {record['gpu']['machine']}. {source(record, 'gpu')}",
    ]
    return "\n".join(lines)


def _missed(record: Record, what: str) -> str:
    entry = record["gpu"]
    result = Result(what, entry["values"][what], "", entry["targets"][what])
    return "" if result.met else " **missed**"


PARTS = (
    Part(
        "gpu",
        "`python benchmarks/gpu.py --json FILE` on a machine with a GPU, and --take FILE here",
        tables=(Table("gpu", gpu_table),),
    ),
)
