"""Training, one procedure in every framework: the recipe, the data, the run. Nothing here imports a framework."""
