"""Steps that outlive errors: whoever is to blame for one ends with it, and all others go on."""

from __future__ import annotations

import logging

from gossamer.engine.engine import Engine
from gossamer.engine.results import Output
from gossamer.engine.runner import RunnerEndedError

logger = logging.getLogger("gossamer.engine")
MAX_FAILURES = 3  # steps in a row that fail without any request to blame


class PatientSteps:
    """Steps of an engine; where one raises, each request is stepped apart (:meth:`Engine.step_apart`).

    Args:
        engine: whose steps they are.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._failures = 0

    def step(self) -> list[Output]:
        """The outputs of one step; requests whose step raises are among them, with the error.

        Raises:
            RunnerEndedError: at once.
            Exception: that of the model, after :data:`MAX_FAILURES` steps in a row that nobody is to blame for.
        """
        try:
            outputs = self._engine.step()
            self._failures = 0
        except RunnerEndedError:
            raise
        except Exception:  # of the model or our own: steps must go on for everybody else
            logger.exception("a step of the engine failed; trying its requests one by one")
            steps = self._engine.stats.steps
            outputs = self._engine.step_apart()
            self._failures = 0 if outputs or self._engine.stats.steps > steps else self._failures + 1
            if self._failures == MAX_FAILURES:
                raise
        return outputs
