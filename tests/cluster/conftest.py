import signal

import pytest


@pytest.fixture
def signal_handlers():
    """Sets this process's handlers back after a test of code that sets its own."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
