"""Instruction tuning: pairs of question and answer become masked training batches."""
