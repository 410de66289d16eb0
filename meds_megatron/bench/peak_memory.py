"""Peak memory of several processes together, as the kernel counts it."""

import threading
from pathlib import Path

SAMPLE_SECONDS = 0.02


class PeakMemory:
    """Largest memory of the processes together, a shared page counted once, above that before the block."""

    def __init__(self, processes: list[int]):
        self._files = [Path(f"/proc/{process}/smaps_rollup") for process in processes]
        self._stop = threading.Event()
        self._sampler = threading.Thread(target=self._sample)
        self.extra = 0

    def __enter__(self) -> "PeakMemory":
        self._before = self._total()
        self._sampler.start()
        return self

    def __exit__(self, *_) -> None:
        self._stop.set()
        self._sampler.join()

    def _sample(self) -> None:
        while not self._stop.wait(SAMPLE_SECONDS):
            self.extra = max(self.extra, self._total() - self._before)

    def _total(self) -> int:
        return sum(self._pss(file.read_text()) for file in self._files)

    @staticmethod
    def _pss(text: str) -> int:
        return 1024 * next(int(line.split()[1]) for line in text.splitlines() if line.startswith("Pss:"))
