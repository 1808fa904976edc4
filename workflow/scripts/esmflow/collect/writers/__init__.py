"""Output formats: one small module each, behind one interface, `base`. `collect.formats` lists them."""
