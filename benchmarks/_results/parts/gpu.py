"""Speed of networks on a GPU: the JSON of `gpu.py` from another machine."""

from _results.part import Part, Record, Table, source


def gpu_table(record: Record) -> str:
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
    return "\n".join([*lines, "", f"On {record['gpu']['machine']}. {source(record, 'gpu')}"])


PARTS = (
    Part(
        "gpu",
        "`python benchmarks/gpu.py --json FILE` on a machine with a GPU, and --take FILE here",
        tables=(Table("gpu", gpu_table),),
    ),
)
