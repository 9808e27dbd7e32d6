"""Evaluation of checkpoints: lm-eval tables, needle-in-a-haystack sweeps, reports."""
