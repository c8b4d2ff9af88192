"""The proof of a pruned folder, and the check of what its report claims."""
