"""What people have, as records: the sample sheet, and readers of FASTA files and tables."""
