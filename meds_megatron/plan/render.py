"""A plan as text for a terminal."""

from rich import box
from rich.console import Console
from rich.table import Table

from meds_megatron.plan.duration import TIMED
from meds_megatron.plan.hardware import GIB
from meds_megatron.plan.memory import PARTS
from meds_megatron.plan.plan import Plan

MOST_ROWS = 16
SMALL = 4 * GIB
"""Size below which memory is shown in MiB."""


def show_plan(plan: Plan, console: Console) -> None:
    """Prints the plan: the layout, then a table each of places, memory, traffic and time, then whether it fits."""
    _line(console, headline(plan))
    for line in divisions(plan):
        _line(console, line)
    for title, table in (
        ("Placement", placement_table(plan)),
        (f"Memory of the fullest {'GPU' if plan.on_gpu else 'process'} in each phase", memory_table(plan)),
        ("Sent in a step by the busiest rank", traffic_table(plan)),
        ("Time of a step", time_table(plan)),
    ):
        console.print()
        _line(console, title, style="bold")
        console.print(table)
    for line in notes(plan):
        _line(console, line)
    console.print()
    if plan.refusal is None:
        fits = "The run fits." if plan.on_gpu else "Without GPUs there is no limit to check against."
        _line(console, fits, style="green" if plan.on_gpu else None)
    else:
        _line(console, plan.refusal, style="red")


def headline(plan: Plan) -> str:
    layout, cluster, rollout = plan.layout, plan.config.cluster, plan.config.rollout
    device = plan.hardware.name if plan.on_gpu else "processes without GPUs"
    context = f" x {layout.context} context" if layout.context > 1 else ""
    virtual = f" x {layout.virtual} virtual" if layout.virtual > 1 else ""
    own = "on the trainer's nodes" if rollout.nodes is None else f"on {_count(rollout.nodes, 'node')} of their own"
    return (
        f"{plan.config.name}: {_count(cluster.nodes, 'node')} x {cluster.ranks_per_node} {device}; trainer ranks: "
        f"{layout.tensor} tensor{context} x {layout.pipeline} pipeline{virtual} x {layout.data} data parallel; "
        f"{_count(rollout.engines, 'engine')} of {_count(rollout.tensor, 'rank')}, {own}."
    )


def divisions(plan: Plan) -> list[str]:
    """Split of the model and a mini-batch over the ranks."""
    shape, layout, train = plan.shape, plan.layout, plan.config.train
    sizes = layout.stage_sizes(shape.num_layers)
    stages = " + ".join(map(str, sizes)) if len(sizes) > 1 else "one stage"
    return [
        f"{shape.num_layers} layers as {stages}; on a tensor rank {shape.num_heads // layout.tensor} heads, "
        f"{shape.num_kv_heads // layout.tensor} key/value heads and {shape.ffn_size // layout.tensor} feed-forward "
        f"columns; an update's {train.mini_batch_prompts * plan.config.rollout.responses_per_prompt} responses as "
        f"{_count(plan.micro_batches, 'micro-batch')} of {train.micro_batch_tokens:,} tokens on each of "
        f"{_count(layout.data, 'replica')}."
    ]


def placement_table(plan: Plan) -> Table:
    table = _table(
        "node", "GPUs" if plan.on_gpu else "places", "ranks", "stage", "TP", "CP", "DP", "layers", "engine", "shard"
    )
    rows = plan.placement
    for row in rows[:MOST_ROWS]:
        place = (row.node, row.gpus, row.ranks, row.stage, row.tensor, row.context, row.replica)
        cells = (*place, row.layers, row.engines, row.shard)
        table.add_row(*("" if cell is None else str(cell) for cell in cells))
    if len(rows) > MOST_ROWS:
        table.add_row("...", f"{len(rows) - MOST_ROWS} more", *[""] * 8)
    return table


def memory_table(plan: Plan) -> Table:
    """A column for each phase, and one for engines on GPUs without a trainer rank; a row for each part."""
    peaks = plan.memory.columns.values()
    unit, name = (GIB, "GiB") if max(peak.total for peak in peaks) >= SMALL else (2**20, "MiB")
    table = _table(name, *plan.memory.columns)
    table.add_row("on node, GPU" if plan.on_gpu else "on", *(_device(peak.device, plan.on_gpu) for peak in peaks))
    for part in PARTS:
        if any(part in peak.parts for peak in peaks):
            table.add_row(part, *(_number(peak.parts.get(part), unit) for peak in peaks))
    table.add_section()
    table.add_row("total", *(_number(peak.total, unit) for peak in peaks))
    if plan.memory.limit is not None:
        table.add_row("of", *(_number(plan.memory.limit, unit) for _ in peaks))
    return table


def traffic_table(plan: Plan) -> Table:
    traffic, weights = plan.traffic, plan.traffic.weights
    rows = [
        ("tensor parallel, forward", traffic.tensor_forward, False),
        ("tensor parallel, update", traffic.tensor_update, False),
        ("context parallel, forward", traffic.context_forward, traffic.context_crosses),
        ("context parallel, update", traffic.context_update, traffic.context_crosses),
        ("pipeline, forward", traffic.pipeline_forward, traffic.pipeline_crosses),
        ("pipeline, update", traffic.pipeline_update, traffic.pipeline_crosses),
        ("data parallel, gradients and weights", traffic.data, traffic.data_crosses),
        ("tied embedding's gradients", traffic.tied, traffic.pipeline_crosses),
        ("weights to all engines, within nodes", weights.local_bytes, False),
        ("weights to all engines, between nodes", weights.network_bytes, True),
    ]
    unit, name = (GIB, "GiB") if max(size for _, size, _ in rows) >= SMALL else (2**20, "MiB")
    table = _table("what", name, "over")
    for what, size, crosses in rows:
        if size:
            table.add_row(what, f"{size / unit:,.1f}", "network" if crosses else "links of a node")
    return table


def time_table(plan: Plan) -> Table:
    calibration, total = plan.calibration, plan.step_seconds
    columns = ["phase", "seconds", "share"]
    if calibration is not None:
        columns += ["predicted for the run", "measured in it", "factor"]
    table = _table(*columns)
    for phase in TIMED:
        row = [phase, _seconds(plan.seconds[phase]), f"{plan.seconds[phase] / total:.0%}"]
        if calibration is not None:
            row += [_seconds(calibration.predicted[phase]), _seconds(calibration.measured[phase])]
            row.append(f"{calibration.factors[phase]:.2f}")
        table.add_row(*row)
    table.add_section()
    table.add_row("step", _seconds(total), *[""] * (len(columns) - 2))
    return table


def notes(plan: Plan) -> list[str]:
    """Assumptions of the figures."""
    tokens, engine, hardware = plan.tokens, plan.memory.engine, plan.hardware
    source = "as in the run" if plan.calibration else "assumed"
    overlaps = plan.config.train.max_staleness > 0
    overlap = "rollout overlaps with forward and update" if overlaps else "nothing overlaps"
    lines = [
        f"A step ({source}): {tokens.generated:,.0f} responses generated, {tokens.trained:,.0f} trained on; mean "
        f"prompt {tokens.prompt:,.0f} and response {tokens.response:,.0f} tokens. An engine's KV cache holds "
        f"{max(engine.kv_cache, 0) // engine.kv_bytes_per_token:,} tokens, {engine.full_sequences:,} sequences of the "
        "longest prompt and response.",
        f"Assumed: {hardware.tflops:g} TFLOP/s at {hardware.efficiency:.0%}, memory {hardware.memory_gbyte:g} GB/s at "
        f"{hardware.memory_efficiency:.0%}, {hardware.local_gbyte:g} GB/s within a node, {hardware.network_gbit:g} "
        f"Gbit/s of a node to others; {overlap}.",
    ]
    if plan.calibration:
        lines.append(f"Times are multiplied by what {plan.calibration.steps} steps of {plan.calibration.run_dir} took.")
    else:
        lines.append("An estimate, for comparing layouts: --calibrate RUN_DIR replaces it by a run's own times.")
    return lines


def _table(first: str, *others: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1))
    table.add_column(first, no_wrap=True)
    for name in others:
        table.add_column(name, justify="right" if name not in ("over", "layers") else "left")
    return table


def _line(console: Console, text: str, style: str | None = None) -> None:
    console.print(text, style=style, highlight=False, markup=False)


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 'es' if what.endswith('ch') else 's'}"


def _device(device, on_gpu: bool) -> str:
    if not on_gpu:
        return "an engine" if device.stage is None else f"stage {device.stage}"
    return f"{device.node}, {device.gpu}"


def _number(size: int | None, unit: int) -> str:
    if size is None:
        return ""
    return f"{size / unit:,.1f}" if unit == GIB else f"{size / unit:,.0f}"


def _seconds(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 1 else f"{value:.3f}"
