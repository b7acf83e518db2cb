"""Training: the engine, the step loop, the schedule, the optimizers and the metrics."""
