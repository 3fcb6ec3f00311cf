"""The task families; each module's `make(rng, split)` returns one sample."""
