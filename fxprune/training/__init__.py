"""Pruning while a model trains, as a user drives it.

- `pruner`     `Pruner`: attaches to a training loop, or is told by hooks; `finish` gives a smaller model
- `steps`      how an optimizer is followed; `finite` whether a step may be made; `wrapped` which models are refused
- `masking`    several prunings on the same weights; `rewind` weights put back to an earlier step
- `distill`    a dense or larger model as a teacher; `taps` reads hidden states
- `finish`     from masks to a plan, and through rewriting and proof to a `Pruned`
- `ladder`     a family of ever faster models from one run
- `recipe`     several stages in YAML; `run` goes through them, `fit` takes the steps of one:
               `task`, `batches`, `optimizers`, `compose`, `show`
- `checkpoint` files of a run that goes on later; `run_folder` those of a recipe's run
- `log`        what is written down at each update: for the terminal, as CSV, for TensorBoard
- `callbacks/` for transformers' Trainer and Lightning
"""
