"""The type checker of the signatures, which tests/conftest.py installs."""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int is accepted as a float
