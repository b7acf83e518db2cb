"""The whole arc in one go, by the same commands that a user types."""
