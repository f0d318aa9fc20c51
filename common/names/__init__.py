"""What each community calls the layers of a network: one module a family, all communities side by side."""
