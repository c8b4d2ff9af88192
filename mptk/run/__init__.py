"""The stages of a run in order: prepare, choose, cut, train, write, prove, describe."""
