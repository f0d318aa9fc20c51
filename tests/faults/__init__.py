"""Faults planted in ports of models that are written in other styles than ours, and what a diagnosis must call each."""
