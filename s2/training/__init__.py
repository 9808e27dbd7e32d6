"""Training: the Lightning module, DeepSpeed strategy, schedules, checkpoints and the recipe command line."""
