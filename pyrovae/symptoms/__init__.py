"""What may be wrong with a program: a function for each, whose findings say why it matters and what to change."""
