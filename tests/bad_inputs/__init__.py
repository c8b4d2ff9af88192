"""A table of inputs that a user, or somebody who means harm, may give: what is on disk, the command, what it must say."""

from __future__ import annotations

from tests.bad_inputs import bombs, data, models, options, plans, results

ROWS = [*options.ROWS, *models.ROWS, *results.ROWS, *plans.ROWS, *data.ROWS, *bombs.ROWS]
