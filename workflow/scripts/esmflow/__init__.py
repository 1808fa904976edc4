"""esmflow: from protein FASTA files to ESM-2 embeddings, with every record accounted for.

The library behind the workflow's scripts. It can be imported on its own and knows nothing of Snakemake.
"""
