"""The figures of a plan as plain JSON values: a launch writes them down, and a report holds them against what came.

The trap is to reckon the plan again when the run is over: by then the speed of the run itself is known and a plan made
from it agrees with it, whatever was promised.
"""

from typing import Any

from cheaptrain.report.advice import warnings
from cheaptrain.report.reckon import PlanReport


def plan_figures(report: PlanReport) -> dict[str, Any]:
    """What `report` expects of a run; None for what it does not know. Seconds are of training steps alone."""
    outlook, resolved, facts, memory = report.outlook, report.outlook.resolved, report.outlook.facts, report.memory
    return {
        "processes": outlook.world_size,
        "layout": str(outlook.batch.layout),
        "parameters": facts.parameters if facts else None,
        "trained_parameters": facts.adapters if facts and report.recipe.lora is not None else None,
        "steps": resolved.steps if resolved else None,
        "tokens": resolved.tokens if resolved else None,
        "tokens_per_step": outlook.batch.tokens_per_step,
        "flops": resolved.flops if resolved else None,
        "flops_per_token": facts.flops_per_token if facts else None,
        "seconds": report.seconds,
        "tokens_per_second": report.speed.tokens_per_second * outlook.world_size if report.speed else None,
        "speed_from": report.speed.source if report.speed else None,
        "dollars": report.dollars,
        "dollars_per_gpu_hour": report.recipe.plan.dollars_per_gpu_hour,
        "memory_bytes": memory.peak if memory else None,
        "device": report.device.name,
        "device_bytes": report.device.memory_bytes,
        "disk_bytes": {disk.name: disk.there + disk.needed for disk in report.disks},
        "sources": [
            {
                "name": source.name,
                "share": source.share,
                "tokens": source.tokens,
                "prepared_tokens": source.prepared_tokens,
                "epochs": source.epochs,
                "max_epochs": source.max_epochs,
            }
            for source in report.sources
        ],
        "warnings": list(warnings(report)),
    }
