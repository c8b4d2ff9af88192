"""How a budget is divided among families and layers: candidates, trials, ranking."""
