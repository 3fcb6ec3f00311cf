"""Everything that depends on SGLang's internals, by area, and what is changed there at run time."""
