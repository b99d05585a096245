"""The paper's claims as experiments: a sweep of small trainings, and a table of what came out."""
