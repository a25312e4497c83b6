"""A plan as text: a table of meshes, the details of one, why others are illegal, and what starts it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from d2o_dist.config.parallel import ParallelConfig
from d2o_dist.plan.planner import MeshPlan, Workload

_HEAD = (
    "mesh (dp x sp x tp)", "prompt read by", "cache by", "peak GiB", "rows", "first token s", "tokens/s", "request s",
    "MB/token", "calls/token", "most time goes to (prompt; token)",
)  # fmt: skip


def meshes_table(plans: Sequence[MeshPlan], *, markdown: bool = False) -> str:
    """A line a mesh. What does not fit is marked."""
    rows = [_HEAD, *(_row(plan) for plan in plans)]
    if markdown:
        lines = ["| " + " | ".join(row) + " |" for row in rows]
        return "\n".join([lines[0], "|" + "---|" * len(_HEAD), *lines[1:]])
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEAD))]
    last = len(_HEAD) - 1
    return "\n".join(
        "  ".join(
            cell if column == last else cell.ljust(width) if column < 3 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


def _row(plan: MeshPlan) -> tuple[str, ...]:
    share, times = plan.share, plan.times
    shared = share.sp > 1
    return (
        f"{plan.dp} x {share.sp} x {share.tp}",
        share.parallel.sp_prefill if shared else "-",
        share.parallel.cache_layout if shared else "-",
        f"{plan.memory.peak / 2**30:.1f}" + ("" if plan.fits else " (does not fit)"),
        str(plan.most_rows),
        _brief(times.first_token),
        _brief(plan.tokens_per_s),
        _brief(plan.batch_s),
        _brief(sum(one.bytes for one in plan.step) / 1e6),
        f"{sum(one.calls for one in plan.step):.1f}",
        times.bottleneck,
    )


def details(work: Workload, plan: MeshPlan) -> str:
    """Memory and time of one mesh, part by part."""
    memory, times = plan.memory, plan.times
    by_layer = memory.reading == "layerwise"
    gib = {
        "weights": memory.weights,
        f"whole cache, {'never in memory' if by_layer else 'while the prompt is read'}": memory.prompt,
        "  one layer of it": memory.one_layer,
        "hidden states of the prompt": memory.hidden,
        "kept cache": memory.kept,
        "statistics": memory.statistics,
        "one forward": memory.forward,
        "peak while reading": memory.weights + memory.reading_peak,
        "peak while compressing": memory.weights + memory.compressing_peak,
        "while generating": memory.weights + memory.decoding,
    }
    seconds = {
        "prompt, products with weights": times.prompt_weights,
        "prompt, attention and statistics": times.prompt_attention,
        "prompt, links": times.prompt_links,
        "token, memory bandwidth": times.token_memory,
        "token, Python": times.token_host,
        "token, links": times.token_links,
    }
    lines = [f"a GPU of {plan.dp} x {plan.share.sp} x {plan.share.tp}, {work.batch} rows of {work.tokens} tokens, "
             f"budget.rule {work.d2o.budget.name}:"]  # fmt: skip
    lines += [f"  {name:<38} {size / 2**30:>10.2f} GiB" for name, size in gib.items()]
    lines += [f"  {name:<38} {_brief(size):>10} s" for name, size in seconds.items()]
    sent = {"sent for a prompt": plan.prompt, "sent for a token": plan.step}
    for name, parts in sent.items():
        total, calls = sum(one.bytes for one in parts), sum(one.calls for one in parts)
        lines.append(f"  {name:<38} {_brief(total / 1e6):>10} MB in {calls:.1f} collectives")
    return "\n".join(lines)


def refusals(refused: Sequence[tuple[ParallelConfig, str]]) -> str:
    """The reasons, each with its meshes."""
    by_reason: dict[str, list[str]] = {}
    for mesh, reason in refused:
        by_reason.setdefault(reason, []).append(f"{mesh.dp} x {mesh.sp} x {mesh.tp}")
    return "\n".join(f"{', '.join(meshes)}: {reason}" for reason, meshes in by_reason.items())


def assumptions(work: Workload) -> str:
    """What no one has measured."""
    values = ", ".join(f"{name}={value}" for name, value in dataclasses.asdict(work.assume).items())
    figures = ", ".join(f"{name}={value}" for name, value in dataclasses.asdict(work.gpu).items())
    return (
        f"assumed, not measured: {values}\nof the GPU's data sheet: {figures}\n"
        "Times rest on both; memory and what is sent are counted. No GPU has run this library."
    )


def launch_commands(work: Workload, config_file: str) -> list[str]:
    """What starts the run on these GPUs: torchrun, and the same with deepspeed."""
    run = f"launch/infer.py --config {config_file} --prompts prompts.jsonl --output results.jsonl"
    nodes = -(-work.num_gpus // work.gpus_per_node)
    if work.num_gpus == 1:
        return [f"python {run}"]
    if nodes == 1:
        return [f"torchrun --nproc-per-node {work.num_gpus} {run}", f"deepspeed --num_gpus {work.num_gpus} {run}"]
    each = (
        f"torchrun --nnodes {nodes} --node-rank NODE --nproc-per-node {work.gpus_per_node} "
        f"--master-addr FIRST_NODE --master-port 29500 {run}"
    )
    return [each, f"deepspeed --hostfile launch/hostfile.example {run}"]


def _brief(value: float) -> str:
    """Three figures."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
