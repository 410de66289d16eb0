"""How the memory's inner loops are compiled."""

import numba


def compiled(function):
    """Compile a loop over plain arrays with numba, once per machine.

    Division follows numpy (1 / 0 is infinite) and sums keep their order, so results are the same in every process.
    The interpreter lock is released, so a lookup and a recluster can run side by side.
    """
    try:
        return numba.njit(cache=True, nogil=True, error_model="numpy")(function)
    except RuntimeError:
        # Neither the package's folder nor the user's cache can be written: compile in every process.
        return numba.njit(nogil=True, error_model="numpy")(function)
