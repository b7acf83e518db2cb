"""The planner's best layouts, tried with real steps."""
