"""The checker that jaxtyping's import hook puts around every function of the package."""

from beartype import BeartypeConf, beartype

# The numeric tower lets an int stand where a float is announced, as Python itself does.
checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
