"""What users of pruning libraries reported as broken: a small model for each report, and what must come out of it.

The numbers of the rows are those of the list that the reports were collected in; each docstring names the public
threads (TP: VainF/Torch-Pruning, OTO: tianyic/only_train_once). A model is pruned, or a dimension stays whole with a
stated reason: never a wrong result, a crash, or nothing done without a word.
"""
