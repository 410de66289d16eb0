"""Numbers of examples of property tests: as stated, with --fast a tenth, with --full five times as many."""

import os

from hypothesis import HealthCheck, settings

FACTORS = {"fast": 0.1, "": 1, "full": 5}
FEWEST = 20


def examples(stated: int) -> settings:
    """Settings of a property test that draws `stated` examples; how long one takes says more about the machine."""
    count = max(min(FEWEST, stated), round(stated * FACTORS[os.environ.get("MEDS_TEST_EXAMPLES", "")]))
    return settings(max_examples=count, deadline=None, suppress_health_check=list(HealthCheck))
