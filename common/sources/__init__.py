"""Where files come from: known weights, downloads, the hub."""
