"""The kinds of files that checkpoints come in. A container keeps tensors by name and knows no network."""
