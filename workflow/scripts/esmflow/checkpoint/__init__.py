"""The model's weights: found or downloaded, converted once, opened and checked."""
