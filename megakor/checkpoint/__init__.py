"""Checkpoints by canonical name: committed or absent, read in any layout, without pickle."""
