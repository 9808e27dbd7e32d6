"""What Lightning, DeepSpeed and torch leave to be worked around, one function or class each, with the version seen.

tests/training/test_gaps.py shows each gap in the library itself: a test that fails there says what can go.
"""
