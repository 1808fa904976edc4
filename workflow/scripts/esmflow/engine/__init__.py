"""ESM-2 itself: packs of sequences to arrays, on a GPU or a CPU. The only room that imports torch freely."""
