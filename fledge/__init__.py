"""fledge: raise a language model from raw text to an aligned assistant."""

__version__ = "0.1.0"
