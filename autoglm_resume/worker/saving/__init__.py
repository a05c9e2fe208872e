"""How a rank's state gets out of its way: when it saves, how it is copied into shared memory,
and what it says to its saver.
"""
