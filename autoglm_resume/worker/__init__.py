"""What runs in a rank's own process: from a fresh or forked process to the user's script, and
the session through which that script resumes, beats and saves.
"""
