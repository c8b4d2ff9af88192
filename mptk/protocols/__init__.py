"""The values that stages hand on, the protocols of what differs between runs, and the folder of a run."""
