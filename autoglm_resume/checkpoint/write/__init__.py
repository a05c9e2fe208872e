"""How does a rank's snapshot become a part on storage, or a sealed checkpoint in memory?

What ranks hold alike is stored by one of them; what the checkpoint before has is not stored again.
"""
