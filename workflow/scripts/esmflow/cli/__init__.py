"""The command `esmflow`: a thin face on the workflow. What it writes and runs, a user could write and run."""
