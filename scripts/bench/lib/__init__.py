"""What the programs of scripts/bench share. A program's folder is in its sys.path: `from lib …`."""
