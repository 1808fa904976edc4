"""ESM-2's vocabulary of 33 tokens, as fair-esm numbers them (`esm.data.Alphabet.from_architecture("ESM-1b")`)."""

CLS, PAD, EOS, UNK = 0, 1, 2, 3
RESIDUES = "LAGVSERTIDPKQNFYMHWCXBUZO.-"
FIRST_RESIDUE = 4
MASK = 32
SIZE = 33

RESIDUE_TOKEN = {residue: FIRST_RESIDUE + i for i, residue in enumerate(RESIDUES)}
