"""What training would see of a data set, before it starts: prompts, cuts, loss tokens, and how far the teacher is."""
