"""`megakor plan` and `megakor plan search`: what a run needs, and the layouts that suit it, without its machines."""

from __future__ import annotations

from megakor.config.compose import main
from megakor.config.schema import PlanConfig, PlanSearchConfig
from megakor.plan.memory import GIB
from megakor.plan.picture import write_picture
from megakor.plan.plan import Plan, Subject, make_plan
from megakor.plan.search import mended, search
from megakor.plan.search_table import as_json as found_as_json
from megakor.plan.search_table import print_table
from megakor.plan.table import as_json, print_tables


def run(config: PlanConfig | PlanSearchConfig) -> None:
    """Print the figures as tables or as one JSON object.

    Raises:
        ValueError: the layout does not fit, or none does; what was found out has been printed.
    """
    if isinstance(config, PlanSearchConfig):
        subject = Subject.of(config)
        found = search(config, subject)
        print(found_as_json(found)) if config.format == "json" else print_table(config, subject, found)
        if not found.layouts:
            raise ValueError(f"cluster.gpus={config.cluster.gpus} must hold the model: no layout fits")
        return
    plan = make_plan(config)
    print(as_json(plan)) if config.format == "json" else print_tables(plan)
    if config.picture is not None:
        write_picture(plan, config.picture)
    if not plan.fits:
        raise ValueError(does_not_fit(plan, config))


def does_not_fit(plan: Plan, config: PlanConfig) -> str:
    """By how much, and what to change."""
    stage = plan.fullest
    need, have = stage.total / GIB, plan.hardware.memory_gib
    what = f"stage {stage.stage} needs {need:.1f} GiB and must fit into the {have:g} GiB of {plan.hardware.name}"
    change = mended(config, Subject.of(config))
    if change is None:
        return f"{what}: {need - have:.1f} GiB too much; on {plan.dims.world_size} of them no layout fits"
    keys, layout = change
    words = " ".join(f"{key}={value}" for key, value in keys.items())
    return f"{what}: {need - have:.1f} GiB too much; {words} takes {layout.memory.total / GIB:.1f} GiB"


if __name__ == "__main__":
    main("plan", run)
