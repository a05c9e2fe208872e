"""What the programs of scripts/bench have trained: scripts of their own, some also imported."""
