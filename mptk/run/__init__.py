"""run: one run of ``prune``: its settings, the values that its stages hand on, their protocols, its report."""
