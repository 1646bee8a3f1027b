"""Imports what the end of a run needs while its workers still evaluate and save: seconds that nobody has to wait for."""

from __future__ import annotations

import logging
import threading

from heliostat.recipes.protocol import Exports, Recipe

log = logging.getLogger(__name__)

WAIT_S = 120.0  # the longest that the end of a run waits for imports that it would make itself


class WarmUp:
    """Imports, once it is told to, what exporting and logging a recipe's model takes."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self._thread = threading.Thread(target=self._import, name="warm-up", daemon=True)

    def begin(self) -> None:
        """Begins in a thread; does nothing if it has begun, or if the recipe exports nothing."""
        if isinstance(self.recipe, Exports) and not self._thread.ident:
            self._thread.start()

    def wait(self) -> None:
        """Waits until the imports are made, if they have begun."""
        if self._thread.ident:
            self._thread.join(WAIT_S)

    def _import(self) -> None:
        """Builds the recipe's model without memory for it, as the export will."""
        try:
            import torch

            from heliostat.inference import export  # noqa: F401
            from heliostat.recipes import building
            from heliostat.tracking import models  # noqa: F401

            with torch.device("meta"):
                building.build(self.recipe)
        except Exception as e:  # noqa: BLE001 (whatever it is, the export meets it again, and says so)
            log.debug("warming up: %s", e)
