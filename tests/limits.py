"""Time limits of tests for what must come."""

HANG_SECONDS = 900
"""Far longer than anything takes on a machine that is busy with other work: what takes longer hangs."""
