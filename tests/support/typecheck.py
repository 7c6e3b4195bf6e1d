"""The run-time type checker that jaxtyping applies under pytest: beartype, with int accepted where float is asked."""

from beartype import BeartypeConf, beartype

typechecked = beartype(conf=BeartypeConf(is_pep484_tower=True))
