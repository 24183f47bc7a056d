"""Which tuner reaches a good model at what cost: a table of recorded runs, a protocol, opponents, pictures.

table      configurations and curves that were recorded
protocol   targets, costs, profiles, intervals, regret
training   one run of a family, recorded
record     all runs of the table, resumable
"""
