"""Ways to decide what stays while a model trains, one file for each idea."""
