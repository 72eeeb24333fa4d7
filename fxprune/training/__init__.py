"""Pruning while a model trains, as a user drives it.

- `pruner`     `Pruner`: attaches to a training loop, or is told by hooks; `finish` gives a smaller model
- `distill`    `Distiller`: the loss blended with what is lost against a teacher; `taps` what layers return
- `callbacks`  for the training loops of transformers and Lightning
- `finish`     from masks to a plan, and through rewriting and proof to a `Pruned`
- `log`        what is written down at each update: for the terminal, as CSV, for TensorBoard
"""
