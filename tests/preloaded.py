"""Imports what the ranks of `tests.ranks` need, once for all of them, in the server that they are forked from."""

from __future__ import annotations

import gc
import importlib

MODULES = (
    "megakor.pretrain",
    # What DeepSpeed would import in every rank, when a group and an engine are first made.
    "deepspeed.ops.op_builder.all_ops", "deepspeed.comm.mori", "deepspeed.runtime.zero.muon.muon_optimizer",
    "deepspeed.module_inject.auto_ep_layer", "deepspeed.runtime.superoffload.superoffload_stage3",
    "s3fs",
    # What the modules import that ranks' functions are of.
    "hypothesis", "peft", "transformers", "tests.data.killed", "tests.train.engines",
)  # fmt: skip

gc.disable()  # a third of the time would go to the collector
for name in MODULES:
    importlib.import_module(name)
gc.freeze()
gc.enable()
