"""What a user can get wrong on the way in or out."""


class ProcessingError(ValueError):
    """Data, statistics, a mapping or a tokenizer that GR00T N1.6 cannot work with; the message says what to do."""
