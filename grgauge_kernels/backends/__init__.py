"""One module a backend, all with the same three functions: unavailable(), measure_() and prepare_adamw_().

The last takes all the memory that it needs and returns the call that does the rest, and the sums: a step over several
buckets that runs out of memory then finds nothing changed.

`..ops` holds their contract and is the only module that chooses among them.
"""
