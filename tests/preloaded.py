"""Imports what the ranks of `tests.ranks` need, once for all of them, in the server that they are forked from."""

from __future__ import annotations

import gc
import importlib

MODULES = (
    "megakor.pretrain",
    # What DeepSpeed's engine would import in every rank, when it is first made.
    "deepspeed.runtime.zero.muon.muon_optimizer", "deepspeed.module_inject.auto_ep_layer",
    "s3fs",
    # What the modules import that ranks' functions are of.
    "hypothesis", "transformers", "tests.train.engines",
)  # fmt: skip

gc.disable()  # a third of the time would go to the collector
for name in MODULES:
    importlib.import_module(name)
gc.freeze()
gc.enable()
