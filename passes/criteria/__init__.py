"""Criteria, one file each: how much a unit matters."""
