"""A journal told: attempts, recoveries, goodput, sentences, messages. Pure.

Records of older versions are read as well.
"""
