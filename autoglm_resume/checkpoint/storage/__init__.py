"""Where can copies of checkpoints be kept: directories and buckets, by the scheme of an address?

One protocol, one file for each backend.
"""
