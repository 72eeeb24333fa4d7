"""Other pruning tools, run the way their own examples run them, to compare with.

- `torch_pruning`: Torch-Pruning (DepGraph)
- `torch_masks`: `torch.nn.utils.prune`, which writes zeros
- `modelopt`: NVIDIA ModelOpt, FastNAS and 2:4
- `onnxsim`: onnxsim's pruning of ONNX files

`modelopt` and `onnxsim` need packages that no extra of this project installs; `missing()` of each says why it cannot
run, and whoever compares with it prints that in its row.
"""
