"""The tables of docs/performance.md, from what the benchmarks have kept."""

from typing import Any

# script, what is compared, the key (with a dot for one inside another), the goal in words
GOALS = [
    ("generation", "kept tokens/s against `model.generate`, same model", "ratio_vs_hf_generate", "6x"),
    ("generation", "the same, our vocabulary trimmed", "ratio_vs_hf_generate_trimmed", "10x"),
    ("generation", "the same model, ours in float32 too", "ratio_vs_hf_generate_float32", ""),
    ("generation", "the same model, `model.generate` in ours' dtype too", "ratio_vs_hf_generate_same_dtype", ""),
    ("generation", "share of the matrix-rate limit, by the rate in float32", "fraction_of_limit", "0.60"),
    ("generation", "the same, vocabulary trimmed", "fraction_of_limit_trimmed", ""),
    ("generation", "the same, 256 texts at a time, as a run writes them", "fraction_of_limit_trimmed_256", ""),
    ("update", "texts/s against the plain way", "ratio_vs_plain", "3x"),
    ("update", "the same, vocabulary trimmed on both sides", "ratio_vs_plain_trimmed", ""),
    ("update", "the same, vocabulary trimmed on both sides, ours in float32 too", "trimmed.ratio_float32", ""),
    ("update", "whole vocabulary, ours in float32 too", "ratio_vs_plain_float32", ""),
    ("update", "peak memory over the plain way's", "memory_ratio_vs_plain", "0.33"),
    ("update", "the same, ours in float32 too", "memory_ratio_vs_plain_float32", ""),
    ("update", "texts/s against TRL's GRPO trainer", "ratio_vs_trl", "1.5x"),
    ("update", "the same, ours in float32 too", "ratio_vs_trl_float32", ""),
    *(
        ("families", f"{name}, float32 on both sides: {what}", f"{family}.{key}", "no slower")
        for family, name in (("gpt2", "GPT-2 124M"), ("llama", "a Llama of its width"))
        for what, key in (
            ("kept tokens/s against `model.generate`", "generation.ratio_vs_hf_generate"),
            ("update, texts/s against the plain way", "update.ratio_vs_plain"),
        )
    ),
    ("leads", "not in the product: reading texts with `torch.compile`, speed over ours", "ratio_compiled_read", ""),
    ("leads", "not in the product: int8 matrices, reading texts, speed over ours", "ratio_int8_read", ""),
    ("leads", "not in the product: int8 matrices, writing texts, speed over ours", "ratio_int8_write", ""),
    (
        "leads",
        "in no preset: adapters in the upper half of the layers (`llm.adapted_layers`), speed of an update over ours",
        "ratio_upper_half_update",
        "",
    ),
    ("selection", "20,000 vectors against sentence-transformers", "ratio_vs_st", "2x"),
    ("selection", "100,000 vectors, exact, seconds", "seconds_100k", "120"),
    ("selection", "a million vectors, seconds", "seconds_1m", "900"),
    ("selection", "recall at a million vectors", "recall_1m", "0.99"),
    ("slm", "rows/s against `Trainer`, float32 on both sides", "ratio_vs_hf_trainer", "1.5x"),
    ("slm", 'the same, ours with `dtype = "auto"`', "ratio_auto_vs_hf_trainer", ""),
    ("arrival", "share of a step that is no model arithmetic", "overhead_fraction", "under 0.10"),
    (
        "busy",
        "beside processes on half the cores, texts written by the demo's LLM: speed over OpenMP as it is",
        "ratio_busy",
        "",
    ),
    ("busy", "the same with nothing beside it", "ratio_idle", ""),
    ("federation_live", "440 MB there and back, real processes, against bare Flower's: time", "ratio_time", "1.1"),
    ("federation_live", "the same, memory of all processes, training on the server included", "ratio_memory", "1.1"),
    ("federation_live_90", "90 MB, the same: time", "ratio_time", "1.1"),
    ("federation_live_90", "90 MB, the same: memory", "ratio_memory", "1.1"),
    (
        "federation",
        "440 MB there and back in memory, without sockets, against bare messages: time",
        "ratio_time",
        "1.1",
    ),
    ("federation", "the same, memory", "ratio_memory", "1.1"),
    ("federation", "90 MB, the same: time", "sizes.90 MB.ratio_time", "1.1"),
    ("federation", "90 MB, the same: memory", "sizes.90 MB.ratio_memory", "1.1"),
    (
        "federation",
        "uploads a minute of 50 tiny silos at once, in memory: no processes, no LLM, no training",
        "arrivals_a_minute",
        "",
    ),
]


# lead, script, the key of its figure (none where there is none), what the figure is, whether the product has it
LEADS = [
    (
        "generation: top k before anything else, the last position's logits, each prompt read once, finished rows "
        "gone, stop strings by the last tokens, the adapter merged",
        "generation",
        "ratio_vs_hf_generate_float32",
        "times `generate`'s tokens/s, all of them together in float32",
        "yes",
    ),
    ("the same in bfloat16", "generation", "ratio_vs_hf_generate", "times `generate`'s tokens/s in float32", "yes"),
    (
        "a trimmed vocabulary",
        "generation",
        "ratio_vs_hf_generate_trimmed",
        "times `generate`'s tokens/s on the whole one",
        "yes",
    ),
    ("finished rows refilled with new texts", "", "", "not measured", "no"),
    (
        "update: head and divergence in blocks, one reference pass, a prompt's states scored once",
        "update",
        "ratio_vs_plain_float32",
        "times the plain way's texts/s, all of them together in float32",
        "yes",
    ),
    ("the same in bfloat16", "update", "ratio_vs_plain", "times the plain way's texts/s in float32", "yes"),
    ("texts packed into one row; both sequences of a text in one batch", "", "", "not measured", "no"),
    (
        "adapters in the upper half of the layers alone, before the layers below were read once for LLM and reference",
        "leads",
        "ratio_upper_half_update",
        "times our update's speed; what the LLM then learns is not measured",
        "`llm.adapted_layers`, in no preset",
    ),
    ("`torch.compile`, reading texts", "leads", "ratio_compiled_read", "times our speed, once it is compiled", "no"),
    ("int8 matrices, reading texts", "leads", "ratio_int8_read", "times our speed", "no"),
    ("int8 matrices, writing texts", "leads", "ratio_int8_write", "times our speed", "no"),
    (
        "threads that wait for each other sleep sooner",
        "busy",
        "ratio_busy",
        "times the speed on a machine that others use too",
        "yes",
    ),
    (
        "SLM: rows of like length together, token ids made once",
        "slm",
        "ratio_vs_hf_trainer",
        "times `Trainer`'s rows/s, both together",
        "yes",
    ),
    (
        "SLM: products in bfloat16 while it learns",
        "slm",
        "ratio_auto_vs_hf_trainer",
        "times `Trainer`'s rows/s in float32",
        '`dtype = "auto"`, in the demo and what `crosslm init` writes',
    ),
]


SECTIONS = {
    "": "On the CPU",
    "cuda": "On a GPU",
    "float32": "On a CPU that does not multiply in bfloat16",
}
"""What the figures are of, by how the files end (``kept_as`` of ``measure.py``)."""


def leads_table(loaded: dict[str, dict]) -> list[str]:
    """Each lead that was followed on the CPU, or not, and what came of it."""
    lines = ["Leads, and what came of each:", "", "| lead | figure | in the product |", "| --- | --- | --- |"]
    for lead, script, key, what, kept in LEADS:
        found = figure_at(loaded.get(f"performance-{script}", {}), key) if key else None
        said = what if not key else "not measured" if found is None else f"{found} {what}"
        lines.append(f"| {lead} | {said} | {kept} |")
    return [*lines, ""]


def figure_at(result: dict, key: str) -> Any:
    """What a benchmark found under a key of :data:`GOALS`; None where it did not look."""
    for part in key.split("."):
        result = result.get(part) if isinstance(result, dict) else None
    return result


def spreads(result: dict, path: str = "") -> list[str]:
    """A row for each measured quantity of a benchmark, anywhere in it: median, extremes, repeats."""
    if "median" in result:
        numbers = " | ".join(f"{result[name]:,.4g}" for name in ("median", "min", "max", "repeats"))
        return [f"| {path} | {numbers} |"]
    return [
        row
        for name, value in result.items()
        if isinstance(value, dict)
        for row in spreads(value, f"{path}, {name}" if path else name)
    ]


def performance(loaded: dict[str, dict], remarks: list[str]) -> str:
    """What performance.md must hold; at its end the remarks on its figures."""
    lines = [
        "# Performance",
        "",
        "Written by `python benchmarks/results.py render` from `benchmarks/results/performance-*.json`; not edited by "
        "hand. `make bench` measures again what `benchmarks/update.py --trl PYTHON` (TRL in an environment of its own: "
        "`pip install trl peft`; `make bench TRL=PYTHON` has it too) and `benchmarks/federation_live.py` (real "
        "processes) do not. "
        "Sides that are compared ran in turn in one process, but for TRL, which has a process of its own between two "
        "blocks of ours, for the busy machine, where each side is a process, and for real processes, where four rounds "
        "of bare Flower came before ten of ours. A ratio of "
        "times is a median over the repeats that the second table gives, the update's over two; an arrival and 100,000 "
        "and a million vectors ran once. A ratio of memory is of one run of each side in a process of its own. "
        "A figure that misses its goal is shown as it is.",
        "",
    ]
    devices = sorted({name.removeprefix("performance-").partition("-")[2] for name in loaded if "performance-" in name})
    for device in devices:
        lines += [f"## {SECTIONS[device]}", ""]
        lines += ["| what | key | measured | goal | commit, machine, date |", "| --- | --- | --- | --- | --- |"]
        for script, what, key, goal in GOALS:
            result = loaded.get(f"performance-{script}" + (f"-{device}" if device else ""))
            if result and (measured := figure_at(result, key)) is not None:
                origin = (
                    f"`{result['commit'][:10]}`, {result['machine']}, {result['threads']} threads, {result['date']}"
                )
                lines.append(f"| {what} | `{key}` | **{measured}** | {goal} | {origin} |")
        lines += ["", "Of which the medians are:", "", "| what | median | lowest | highest | repeats |"]
        lines.append("| --- | ---: | ---: | ---: | ---: |")
        for script in dict.fromkeys(script for script, *_ in GOALS):
            result = loaded.get(f"performance-{script}" + (f"-{device}" if device else ""), {})
            lines += [row.replace("_", " ") for row in spreads(result, script)]
        lines.append("")
        arrival = loaded.get("performance-arrival" + (f"-{device}" if device else ""))
        if arrival:
            lines += ["Where one arrival's time goes:", "", "| part | share |", "| --- | --- |"]
            shares = sorted(arrival["shares"].items(), key=lambda item: -item[1])
            lines += [f"| {label} | {share:.3f} |" for label, share in shares]
            texts = arrival["texts"]
            lines += [
                "",
                f"{arrival['seconds']:.0f} s in all for {texts['update']} texts to learn from and a pool of "
                f"{texts['pool']}; {arrival['tokens_generated']:,} tokens generated. All but the optimizer and the "
                "sampling are passes through the models, with all that these cost, the launching of a GPU's kernels "
                "too; what is in no row is the rest. `overhead_fraction` counts the sampling and the rest.",
                "",
            ]
        if not device:
            lines += leads_table(loaded)
    return "\n".join([*lines, *remarks]).rstrip() + "\n"
