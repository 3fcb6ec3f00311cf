"""Changes to SGLang at run time, by area, and the ledger of all private symbols that this package needs."""
