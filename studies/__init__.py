"""Studies: claims about methods, stated before they are tested, and what came out. Each is a package of its own."""
