"""Sweeps: runs of one config that differ in settings and seeds, as Slurm jobs or on this machine.

Importing the package loads nothing else.
"""


def __getattr__(name: str):
    if name == "sweep":
        from meds_megatron.sweeps.run import sweep

        return sweep
    raise AttributeError(f"module {__name__} has no attribute {name}")
