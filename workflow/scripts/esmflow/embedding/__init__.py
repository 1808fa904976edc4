"""An embed job: its slots, its workers, what it writes down while it runs and at its end."""
