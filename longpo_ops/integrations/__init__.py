"""Trainers of other libraries with our losses, references and batches. Each module needs its library."""
