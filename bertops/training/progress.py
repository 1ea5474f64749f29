"""Says how far a run is: a bar in a terminal, a line now and then in a file."""

import sys
import time
from collections.abc import Mapping

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """Writes to standard error, and nothing at all unless ``shown``."""

    def __init__(self, start: int, steps: int, *, shown: bool) -> None:
        self.steps, self.shown = steps, shown
        self._bar = tqdm(
            total=steps, initial=start, unit="step", dynamic_ncols=True, disable=not (shown and _terminal())
        )
        self._last_line = 0.0

    def advance(self) -> None:
        self._bar.update()

    def show(self, step: int, numbers: Mapping[str, float]) -> None:
        """The latest numbers, beside the bar or, every few seconds, on a line of their own."""
        text = ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in numbers.items())
        if not self._bar.disable:
            self._bar.set_postfix_str(text)
        elif time.monotonic() - self._last_line >= SECONDS_BETWEEN_LINES or step == self.steps:
            self._last_line = time.monotonic()
            self.say(f"step {step} of {self.steps}: {text}")

    def say(self, text: str) -> None:
        if self.shown:
            self._bar.write(text, file=sys.stderr)

    def close(self) -> None:
        self._bar.close()


def _terminal() -> bool:
    return sys.stderr.isatty()
