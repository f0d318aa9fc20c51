"""Planted defects: each a small change to one backend that the check must catch, or, for the equivalents, must not."""
