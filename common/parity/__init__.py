"""The proof: records of what backends computed, the tolerances they are held to, and what differs first."""
