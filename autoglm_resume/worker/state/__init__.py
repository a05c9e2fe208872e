"""What a script tracks: whose the parameters are, whether a checkpoint fits it, and how it comes
back to where it was.
"""
