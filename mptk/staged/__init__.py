"""Programs in torch, run stage by stage, so that a model may be larger than memory."""
