"""Worked examples: small models on real or generated data, pruned while they train. See README.md."""
