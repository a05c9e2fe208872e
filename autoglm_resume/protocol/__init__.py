"""What a supervisor, its ranks and their savers share: assignments, heartbeats, messages, memory.
Nothing here imports torch, decides, or starts anything.
"""
