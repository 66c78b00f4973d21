"""Studies: a claim about methods, written down before it is tested, and one word on what came out: ``align study``."""
