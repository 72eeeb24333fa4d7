"""Allocators, one file each: how many units every group keeps under a budget."""
