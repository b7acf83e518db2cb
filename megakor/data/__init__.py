"""Tokenised data: text becomes shards, shards become one stream, and a pure function says which step sees what.

    documents ─► build ─► indexed (.bin/.idx) + manifest ─► stream ◄─ order
    shards elsewhere ─► remote ─► cache ◄─ prefetch

Nothing here knows of devices, process groups or models: numpy arrays leave, floor 1 of the architecture.
"""
