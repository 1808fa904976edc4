"""The configuration, checked; and what is foretold from it: time, memory, disk."""
