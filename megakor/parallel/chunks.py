"""How much the loss works through at a time: its fp32 copies are of a chunk of the logits, never of all."""

HOST_LOSS_CHUNK, ACCELERATOR_LOSS_CHUNK = 2**18, 2**27
"""Logits: what a CPU's cache holds, and enough to fill an accelerator."""
