"""Why two layers differ: what each does, found out from what went in and what came out."""
