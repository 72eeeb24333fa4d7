"""Write-back: the original class with smaller parameters.

- `traced`   numbers in a module's attributes, followed into the arguments of the operators that its code calls
- `solve`    which values the attributes must have, so that those arguments are the rewritten graph's
- `scale`    where the class divides by the root of a width that has changed, the dense scale goes into the weights
- `config`   a configuration that says the smaller sizes, where the class is built from one
- `like`     puts it together, and compares the outputs with the rewritten graph's
"""

from fxprune.writeback.like import Written, copy_weights, module_like

__all__ = ["Written", "copy_weights", "module_like"]
