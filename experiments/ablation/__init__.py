"""A finished experiment: what each part of nano's structure is worth (see its model card)."""
