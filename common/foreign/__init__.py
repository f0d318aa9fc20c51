"""Models that are not ours: what a comparison needs of them, and the adapters of their frameworks."""
