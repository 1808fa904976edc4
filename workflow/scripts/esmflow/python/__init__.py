"""What `import esmflow` gives: the results of a run, and the vectors of a few sequences without one."""
