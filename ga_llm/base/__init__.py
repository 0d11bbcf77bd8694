"""Files and command lines: the names of what scripts hand on, errors of one line, reading, writing whole, the wording.

It knows neither a model nor a metric, and no torch but in `reading` and `sharding`, so that
data-preprocess/ may use the rest.
"""
