"""The values that stages hand on, the protocols of methods, targets and tasks, the report, and the folder of a run."""
