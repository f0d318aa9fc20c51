"""Shows what a comparison found, and decides nothing: console, JSON, JUnit."""
