"""`python -m autoglm_resume.cli`, for machines where the console script is not on PATH."""

from autoglm_resume.cli.app import main

main()
