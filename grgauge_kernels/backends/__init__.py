"""One module a backend, all with the same three functions: unavailable(), measure_() and adamw_().

`..ops` holds their contract and is the only module that chooses among them.
"""
