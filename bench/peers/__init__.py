"""Other pruning tools, run the way their own examples run them, to compare with.

- `torch_pruning`: Torch-Pruning (DepGraph)
"""
