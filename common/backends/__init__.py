"""Backends: the protocol a framework follows, the columns there are, one process for each and what runs inside."""
