"""The two forward passes of a round, on SGLang's runner and attention backends."""
