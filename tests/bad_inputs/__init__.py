"""A table of inputs that a user, or somebody who means harm, may give: what is on disk, what reads it, what it must say."""

from __future__ import annotations

from tests.bad_inputs import bombs, commands, data, models, options, plans, results

ROWS = [*options.ROWS, *models.ROWS, *results.ROWS, *plans.ROWS, *data.ROWS, *bombs.ROWS]
COMMANDS = commands.ROWS
