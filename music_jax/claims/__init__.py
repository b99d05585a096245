"""The paper's claims as experiments: a sweep of small trainings, and tables of their results."""
