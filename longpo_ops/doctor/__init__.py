"""`longpo doctor`: what of the library takes a model, and whether its training would start."""
